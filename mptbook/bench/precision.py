"""`mptbook bench precision`: the same training with norms in full and in low precision.

Two trainings that differ in their last bits drift apart whatever made the difference, so a
third one is the yardstick: full precision, with each weight of the embedding moved to the next
float32 before the first step.
"""

import time
from pathlib import Path

import torch

from mptbook.bench.positions import loss_by_length
from mptbook.bench.training import TrainingBench, heldout_ids, tiny_config, tiny_run, train
from mptbook.data.loader import Rows
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory

NUDGED = "layernorm, nudged"
KINDS = ("layernorm", "low_precision_layernorm", NUDGED)
HELDOUT_TOKENS = 81_920
CURVE_STEPS = 25  # of which a point of the curve is the mean


def model_with(kind: str, config: MPTConfig, seed: int) -> MPT:
    """A fresh model with one of `KINDS` of norm.

    A seed gives all the same weights; `NUDGED` then moves those of the embedding.
    """
    torch.manual_seed(seed)
    model = MPT(config.replace(norm_type=kind.removesuffix(", nudged")))
    if kind == NUDGED:
        with torch.no_grad():
            weight = model.transformer.wte.weight
            weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))
    return model


def thinned(losses: list[float], every: int) -> list[float]:
    """Means of `every` losses at a time, the last of what is left."""
    parts = torch.tensor(losses, dtype=torch.float64).split(every)
    return [round(float(part.mean()), 4) for part in parts]


def compare(data: str | Path, *, steps: int = 1000, seeds: int = 2) -> dict:
    """Train mpt-tiny with each of `KINDS`, on the same batches from the same weights.

    Args:
        data: a folder that `mptbook prepare` wrote.
        steps: of each training.
        seeds: trainings with each; a seed sets the weights and the order of the rows.

    Returns:
        What `book/_data/precision.json` holds: settings; ``loss``, for each kind its held-out
        loss in nats per token, one for each seed; ``curve``, its training loss likewise, means
        over `CURVE_STEPS` steps; ``spread``, largest held-out loss less smallest; ``seconds``.
    """
    keep_freed_memory()
    rows = Rows(data)
    ids = heldout_ids(Tokenizer.load(rows.folder), HELDOUT_TOKENS)
    config = tiny_config(rows)
    found: dict[str, dict] = {"loss": {}, "curve": {}, "spread": {}, "seconds": {}}
    for kind in KINDS:
        start, losses, curves = time.perf_counter(), [], []
        for seed in range(seeds):
            model = model_with(kind, config, seed)
            logs = train(model, rows, tiny_run().optim, steps=steps, seed=seed, name=kind)
            curves.append(thinned([log.loss for log in logs], CURVE_STEPS))
            losses.append(loss_by_length(model, ids, (rows.row_tokens,))[rows.row_tokens])
        found["loss"][kind], found["curve"][kind] = losses, curves
        found["spread"][kind] = max(losses) - min(losses)
        found["seconds"][kind] = (time.perf_counter() - start) / seeds
        print(f"{kind}: held out", *(f"{loss:.4f}" for loss in losses), flush=True)
    return {
        "steps": steps,
        "seeds": seeds,
        "row_tokens": rows.row_tokens,
        "heldout_tokens": HELDOUT_TOKENS,
        "curve_steps": CURVE_STEPS,
    } | found


class BenchPrecision(TrainingBench):
    """Train with full and with low-precision norms: `mptbook bench precision`."""

    def compare(self) -> dict:
        return compare(self.data, steps=self.steps, seeds=self.seeds)
