"""`mptbook bench sweep`: Lion, AdamW and SGD over a grid of learning rates and weight decays.

The same small language model on the same batches, once for each setting and seed; then its
loss on held-out text. Along a grid only the peak learning rate and the weight decay change.
"""

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mptbook.bench.measure import Bench
from mptbook.bench.positions import loss_by_length
from mptbook.bench.training import heldout_ids, tiny_run, train
from mptbook.data.loader import Rows
from mptbook.data.prepare import Prepare, prepare
from mptbook.data.vocabulary import LearnTokenizer
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.groups import decay_groups
from mptbook.optim.lion import Lion
from mptbook.settings import cache_dir
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory

SHAPE = {"d_model": 96, "n_layers": 2}  # of a model that is else like mpt-tiny
VOCABULARY = 1024  # small, so that few steps learn more than how often each token occurs
BATCH_TOKENS = 1024
HELDOUT_TOKENS = 40_960
LION_BETAS = (0.9, 0.98)  # of `configs/tiny.toml`
ADAMW_BETAS = (0.9, 0.95)  # of llm-foundry's example files for MPT
SGD_MOMENTUM = 0.9
GRIDS = {  # learning rates; then weight decays, which all three multiply by the learning rate
    "lion": ((1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "adamw": ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0.0, 0.1, 0.3, 1.0)),
    "sgd": ((0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 1e-3, 1e-2)),
}


def small_rows(folder: Path) -> Path:
    """Rows of 256 tokens of the default texts, cut by a vocabulary of `VOCABULARY` ids.

    Learns the vocabulary and prepares the rows, each only where `folder` has none.

    Returns:
        The folder of the rows, for `compare`.
    """
    vocabulary, rows = folder / "tokenizer.json", folder / "rows"
    if not vocabulary.exists():
        LearnTokenizer(out=vocabulary, vocab_size=VOCABULARY).run()
    prepare(Prepare(out=rows, tokenizer=str(vocabulary), row_tokens=256))
    return rows


def optimizer_for(name: str, model: MPT, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """One of `GRIDS` over the model's weights; only matrices decay."""
    groups = decay_groups(model, weight_decay)
    if name == "lion":
        return Lion(groups, lr=lr, betas=LION_BETAS)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=ADAMW_BETAS, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=SGD_MOMENTUM, fused=True)
    raise ValueError(f"optimizer is {name!r}; it must be one of {', '.join(GRIDS)}")


def trained_loss(
    name: str, lr: float, weight_decay: float, rows: Rows, ids: Tensor, *, steps: int, seed: int
) -> float | None:
    """Nats per token on `ids` after one training; None where a step of it was not finite."""
    torch.manual_seed(seed)
    shape = SHAPE | {"vocab_size": VOCABULARY, "max_seq_len": rows.row_tokens}
    model = MPT(MPTConfig.named("mpt-tiny").replace(**shape))
    optimizer = optimizer_for(name, model, lr, weight_decay)
    optim = tiny_run().optim.model_copy(update={"lr": lr})
    how = {"steps": steps, "seed": seed, "batch_tokens": BATCH_TOKENS}
    if any(log.refused for log in train(model, rows, optim, optimizer=optimizer, **how)):
        return None
    return loss_by_length(model, ids, (rows.row_tokens,))[rows.row_tokens]


def settings() -> Iterator[tuple[str, float, float]]:
    """(name, lr, weight decay) of every training but its seed."""
    for name, (rates, decays) in GRIDS.items():
        yield from ((name, lr, decay) for lr, decay in product(rates, decays))


def compare(data: str | Path, *, steps: int = 400, seeds: int = 2) -> dict:
    """Train with each setting of `GRIDS`, `seeds` times.

    Args:
        data: the folder that `small_rows` returns.
        steps: of each training.
        seeds: trainings with each setting; initial weights and batches depend on them.

    Returns:
        What `book/_data/sweep.json` holds: sizes, and ``runs``, one a setting with its
        ``losses``, nats per token of held-out novels, one a seed.
    """
    keep_freed_memory()
    rows = Rows(data)
    ids = heldout_ids(Tokenizer.load(rows.folder), HELDOUT_TOKENS)
    start, runs = time.perf_counter(), []
    for name, lr, decay in settings():
        losses = [
            trained_loss(name, lr, decay, rows, ids, steps=steps, seed=seed)
            for seed in range(seeds)
        ]
        runs.append({"optimizer": name, "lr": lr, "weight_decay": decay, "losses": losses})
        shown = "  ".join("diverged" if loss is None else f"{loss:.3f}" for loss in losses)
        print(f"{name:6} lr {lr:<7g} decay {decay:<6g} {shown}", flush=True)
    return {
        "steps": steps,
        "seeds": seeds,
        "batch_tokens": BATCH_TOKENS,
        "row_tokens": rows.row_tokens,
        "vocabulary": VOCABULARY,
        "shape": SHAPE,
        "heldout_tokens": HELDOUT_TOKENS,
        "betas": {"lion": LION_BETAS, "adamw": ADAMW_BETAS, "sgd": SGD_MOMENTUM},
        "seconds": time.perf_counter() - start,
        "runs": runs,
    }


class BenchSweep(Bench):
    """Three optimizers over learning rates and weight decays: `mptbook bench sweep`."""

    data: Path | None = Field(
        None, description="folder of prepared rows (default: prepared in the cache)"
    )
    steps: PositiveInt = Field(400, description="steps of each training")
    seeds: PositiveInt = Field(2, description="trainings with each setting")

    def compare(self) -> dict:
        data = self.data or small_rows(cache_dir() / "runs" / "sweep")
        return compare(data, steps=self.steps, seeds=self.seeds)
