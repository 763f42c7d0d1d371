"""Contestants that take whole training steps on a CPU, and the settings of benches that time them.

A step is forward, loss, backward, clipping at 1.0 and the optimizer. A contestant takes it as
its user would: mptbook as `mptbook pretrain` does, the models of transformers in a plain loop
with PyTorch's fused AdamW, with nothing else changed in their process.

Dimensions in this file
    B   rows of a batch
    T   tokens of a row
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from mptbook.bench.measure import added_memory, noise, process_bytes
from mptbook.bench.peers import OURS, make_model, plain_steps
from mptbook.model.config import MPTConfig
from mptbook.model.precision import Precision, resolved
from mptbook.settings import RunSettings
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.loop import train_steps
from mptbook.train.optimizer import Optim, make_optimizer

CLIP = 1.0
LAST_STEP = 4800  # of the run whose first steps mptbook takes: its schedule must have an end
SMALL = MPTConfig(d_model=64, n_heads=1, n_layers=1, vocab_size=16, max_seq_len=16)
NO_ROOM = ("can't allocate memory", "bad_alloc", "MemoryError", "exit code -")  # - by a signal


class Step(NamedTuple):
    """What a contestant says of one step."""

    seconds: float
    loss: float  # nats per token
    added_bytes: int  # peak of resident memory so far over that before the first step


class StepBench(RunSettings):
    """What a bench of training steps can be told."""

    d_model: PositiveInt = Field(384, description="width of the models")
    n_layers: PositiveInt = Field(6, description="their blocks")
    n_heads: PositiveInt = Field(6, description="heads of a block")
    vocab_size: PositiveInt = Field(8192, description="ids")
    precision: Precision = Field(
        "auto", description="for all; auto: bf16 where the processor has units for it"
    )
    out: Path | None = Field(None, description="where to write the figures as JSON")

    @field_validator("precision")
    @classmethod
    def _resolved(cls, precision: Precision) -> Precision:
        return resolved(torch.device("cpu"), precision)  # what the figures are recorded with

    def config(self, row_tokens: int) -> MPTConfig:
        """The shape of all models, for rows of `row_tokens`."""
        return MPTConfig(
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            vocab_size=self.vocab_size,
            max_seq_len=row_tokens,
        )


def random_batches(vocab_size: int, rows: int, row_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (B, T) int64 each, of random ids; the same series each time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        block = torch.randint(vocab_size, (rows, row_tokens + 1), generator=generator)
        yield block[:, :-1], block[:, 1:]


def losses(name: str, model: nn.Module, rows: int, precision: str) -> Iterator[float]:
    """Train on random ids as a user of the contestant would; the loss of each step."""
    batches = random_batches(model.config.vocab_size, rows, model.config.max_seq_len)
    return (our_losses if name == OURS else plain_losses)(model, batches, precision)


def our_losses(model: nn.Module, batches: Iterator, precision: str) -> Iterator[float]:
    """Train as `mptbook pretrain` does with its default settings; the loss of each step."""
    optim = Optim(clip=CLIP)
    keep_freed_memory()
    rates, optimizer = optim.rates(LAST_STEP), make_optimizer(model, optim)
    for log in train_steps(
        model,
        batches,
        optimizer,
        rates,
        steps=LAST_STEP,
        clip=optim.clip,
        precision=precision,
    ):
        yield log.loss


def plain_losses(model: nn.Module, batches: Iterator, precision: str) -> Iterator[float]:
    """Train in a plain loop with fused AdamW at its default rate; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rate = optimizer.defaults["lr"]
    logs = plain_steps(model, batches, optimizer, lambda step: rate, clip=CLIP, precision=precision)
    for log in logs:
        yield log.loss


def contestant(
    name: str, config: MPTConfig, rows: int, precision: str, memory_gb: float | None = None
) -> Callable[[], Step]:
    """A function that takes one step each time it is called, for a `Worker`.

    A step of a very small model goes before, so that what libraries load at the first one is
    not taken for memory of the model.

    Args:
        name: of `mptbook.bench.peers`.
        rows: B; T is the `max_seq_len` of `config`.
        precision: of products, for all.
        memory_gb: the most that model, optimizer and steps may take, in 10^9 bytes.
    """
    next(losses(name, make_model(name, SMALL), 1, precision))
    if memory_gb is not None:
        limit_memory(memory_gb)
    torch.manual_seed(0)
    series = losses(name, make_model(name, config), rows, precision)
    added = added_memory()

    def step() -> Step:
        start = time.perf_counter()
        loss = next(series)
        return Step(time.perf_counter() - start, loss, added())

    return step


def limit_memory(gigabytes: float) -> None:
    """Let this process have so much more memory; beyond it PyTorch raises a RuntimeError.

    Linux counts what was asked for, touched or not, without files that are mapped.
    """
    limit = process_bytes("VmData") + int(gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def no_room(error: RuntimeError) -> bool:
    """Whether a worker failed because its memory was too small, or was ended by the system."""
    return any(sign in str(error) for sign in NO_ROOM)


def flops_per_token(name: str, config: MPTConfig) -> int:
    """FLOPs to train on one token: 6 for each parameter that is in a product.

    A multiplication and an addition in the forward pass, twice as many in the backward pass. A
    tied head is counted once, as the product that it is; a table of learned positions is
    looked up and not counted. Nor are scores and weighted sums of attention, which grow with
    T: `mptbook.plan.flops_per_token` adds them.
    """
    with torch.device("meta"):
        weights = make_model(name, config).named_parameters()
    return 6 * sum(w.numel() for path, w in weights if not path.endswith("wpe.weight"))


def figures(steps: list[Step], tokens: int) -> dict:
    """What is reported of steps of so many tokens, as JSON has it."""
    seconds = [step.seconds for step in steps]
    median, added = statistics.median(seconds), max(step.added_bytes for step in steps)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "noise": noise(seconds),
        "tokens_per_second": tokens / median,
        "added_bytes": added,
        "bytes_per_token": added / tokens,
    }
