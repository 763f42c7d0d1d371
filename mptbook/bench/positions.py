"""`mptbook bench positions`: four ways to tell tokens where they are, trained short, tested long.

The same small model on the same batches, once with each; then its loss on held-out text in
segments longer than it was trained on. Rotary and sinusoidal positions are no part of MPT and
are put around it from outside.

Dimensions in this file
    B   batch
    H   heads
    T   tokens of a row or segment
    K   width of a head
    D   width of the residual stream

Sources: Press, Smith and Lewis, arXiv:2108.12409 (the experiment, and ALiBi); Vaswani et al.,
arXiv:1706.03762, section 3.5 (sinusoidal); Su et al., arXiv:2104.09864 (rotary).
"""

import time
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mptbook.bench.training import TrainingBench, heldout_ids, tiny_config, tiny_run, train
from mptbook.data.loader import Rows
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi")
LENGTHS = (256, 512, 1024, 2048, 4096)
HELDOUT_TOKENS = 81_920  # what the held-out novels have, in segments of 4,096


def model_with(positions: str, config: MPTConfig) -> MPT:
    """A model of the shape of `config` with one of `POSITIONS`.

    Only ALiBi and learned positions are settings of an MPT; the others are hooks on one that
    has no positions, and are lost when it is saved.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions are {positions!r}; they must be one of {', '.join(POSITIONS)}")
    alibi, learned = positions == "alibi", positions == "learned"
    model = MPT(config.replace(alibi=alibi, learned_pos_emb=learned))
    if positions == "sinusoidal":
        scale = float(model.transformer.wte.weight.detach().std())  # as large as the embeddings
        model.transformer.wte.register_forward_hook(
            lambda _, inputs, x: x + scale * sinusoids(x.shape[1], x.shape[2])
        )
    if positions == "rotary":
        for block in model.transformer.blocks:
            block.attn.backend = rotating(block.attn.backend)
    return model


def sinusoids(n_tokens: int, width: int) -> Tensor:
    """(T, D): sines and cosines of the position, in wavelengths from 2 pi to 20,000 pi."""
    angle = angles(n_tokens, width)
    return torch.cat([angle.sin(), angle.cos()], dim=1) * 2**0.5  # of variance 1


def angles(n_tokens: int, width: int) -> Tensor:
    """(T, width / 2): position over 10,000 ** (2 i / width), in radians."""
    frequency = 10_000.0 ** -(torch.arange(0, width, 2) / width)
    return torch.arange(n_tokens)[:, None] * frequency


def rotate(x: Tensor) -> Tensor:
    """(B, H, T, K) with each pair of channels turned by the angle of its position."""
    angle = angles(x.shape[2], x.shape[3])
    first, second = x.float().chunk(2, dim=3)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3).to(x.dtype)


def rotating(backend):
    """A form of attention that rotates queries and keys first; without a cache."""

    def rotated(q, k, v, slopes, **how):
        return backend(rotate(q), rotate(k), v, slopes, **how)

    return rotated


def train_with(positions: str, rows: Rows, steps: int, seed: int = 0) -> MPT:
    """A model of the shape of mpt-tiny trained on `rows`, as `configs/tiny.toml` says."""
    torch.manual_seed(seed)
    model = model_with(positions, tiny_config(rows))
    train(model, rows, tiny_run().optim, steps=steps, seed=seed, name=positions)
    return model


@torch.no_grad()
def loss_by_length(model: MPT, ids: Tensor, lengths=LENGTHS) -> dict[int, float | None]:
    """Nats per token of one text read in segments of T tokens, for each T.

    Every token but the first of the text is predicted once for each T. None where the model
    has no positions for a segment.

    Args:
        ids: (N,) int64, a multiple of every length, plus one.
        lengths: T, ascending.
    """
    model.eval()
    found = {}
    for length in lengths:
        if model.config.has_positions and length > model.config.max_seq_len:
            found[length] = None  # the table ends
            continue
        inputs, targets = (part.view(-1, length) for part in (ids[:-1], ids[1:]))
        nats = 0.0
        for x, y in zip(inputs, targets, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                nats += float(model.loss(x[None], y[None]))
        found[length] = nats / targets.numel()
    return found


def compare(data: str | Path, *, steps: int = 1000, seeds: int = 1) -> dict:
    """Train with each of `POSITIONS` and measure at each of `LENGTHS`.

    Args:
        data: a folder that `mptbook prepare` wrote, with rows of 256 tokens.
        steps: of each training.
        seeds: trainings with each; losses are means over them.

    Returns:
        What `book/_data/positions.json` holds: settings, and ``loss``, ``spread`` (largest
        less smallest over the seeds) and ``seconds`` for each kind of positions.
    """
    keep_freed_memory()
    rows = Rows(data)
    ids = heldout_ids(Tokenizer.load(rows.folder), HELDOUT_TOKENS)
    loss, spread, seconds = {}, {}, {}
    for positions in POSITIONS:
        start = time.perf_counter()
        models = [train_with(positions, rows, steps, seed) for seed in range(seeds)]
        seconds[positions] = (time.perf_counter() - start) / seeds
        found = [loss_by_length(model, ids) for model in models]
        by_length = {length: [one[length] for one in found] for length in LENGTHS}
        known = {length: values for length, values in by_length.items() if None not in values}
        loss[positions] = {
            str(length): sum(known[length]) / seeds if length in known else None
            for length in LENGTHS
        }
        spread[positions] = {str(n): max(values) - min(values) for n, values in known.items()}
        print(positions, {n: value and round(value, 3) for n, value in loss[positions].items()})
    parameters = sum(p.numel() for p in models[0].parameters())
    return {
        "steps": steps,
        "seeds": seeds,
        "row_tokens": rows.row_tokens,
        "parameters": parameters,
        "lengths": list(LENGTHS),
        "heldout_tokens": HELDOUT_TOKENS,
        "loss": loss,
        "spread": spread,
        "seconds": seconds,
    }


class BenchPositions(TrainingBench):
    """Train short, test long, with four kinds of positions: `mptbook bench positions`."""

    seeds: PositiveInt = Field(1, description="trainings of each")

    def compare(self) -> dict:
        return compare(self.data, steps=self.steps, seeds=self.seeds)
