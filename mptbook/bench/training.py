"""Small trainings, for benches that compare what a model learns and not how fast."""

from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mptbook.bench.measure import Bench
from mptbook.data.corpora import load_domain
from mptbook.data.loader import Rows, batches
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.settings import CONFIGS
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.loop import StepLog, train_steps
from mptbook.train.optimizer import Optim, make_optimizer
from mptbook.train.pretrain import Pretrain


class TrainingBench(Bench):
    """What a bench can be told that trains mpt-tiny in several ways."""

    data: Path = Field(description="folder that mptbook prepare wrote, with rows of 256 tokens")
    steps: PositiveInt = Field(1000, description="training steps of each")
    seeds: PositiveInt = Field(2, description="trainings of each")


def tiny_run() -> Pretrain:
    """The settings of `configs/tiny.toml`."""
    return Pretrain.from_toml(CONFIGS / "tiny.toml", data=Path(), out=Path())


def tiny_config(rows: Rows, recipe: Pretrain | None = None) -> MPTConfig:
    """The shape that `configs/tiny.toml`, or another recipe, trains on `rows`."""
    recipe = recipe or tiny_run()
    shape = {"max_seq_len": rows.row_tokens} | recipe.shape
    return MPTConfig.named(recipe.model).replace(**shape)


def train(
    model: MPT,
    rows: Rows,
    optim: Optim,
    *,
    steps: int,
    seed: int = 0,
    name: str = "",
    optimizer: torch.optim.Optimizer | None = None,
    batch_tokens: int | None = None,
) -> list[StepLog]:
    """Train a model in place.

    Args:
        rows: their order depends on `seed`.
        optim: its schedule, with a warm-up of at most a tenth of the steps, and its clipping.
        steps: of the whole training.
        name: what to print it under, now and then; "" prints nothing.
        optimizer: None makes the one that `optim` names.
        batch_tokens: of a step; None takes what `configs/tiny.toml` has.

    Returns:
        The log of each step.
    """
    optim = optim.model_copy(update={"warmup": min(optim.warmup, steps // 10)})
    optimizer = optimizer or make_optimizer(model, optim)
    batch_tokens = batch_tokens or tiny_run().batch_tokens
    stream = batches(rows, batch_tokens // rows.row_tokens, seed=seed)
    logs = []
    for log in train_steps(
        model, stream, optimizer, optim.rates(steps), steps=steps, clip=optim.clip
    ):
        logs.append(log)
        if name and (log.step % 250 == 0 or log.step == steps):
            print(f"{name:10}  step {log.step:5,}  {log.loss:.3f} nats/token", flush=True)
    return logs


def heldout_ids(tokenizer: Tokenizer, n_tokens: int) -> Tensor:
    """(n_tokens + 1,) int64: held-out novels, laid end to end."""
    ids: list[int] = []
    for text in load_domain("novels", "heldout", None)["text"]:
        ids += [*tokenizer.encode(text), tokenizer.end_of_text]
        if len(ids) > n_tokens:
            return torch.tensor(ids[: n_tokens + 1])
    raise ValueError(f"the held-out novels have {len(ids):,} tokens; ask for fewer than {n_tokens}")
