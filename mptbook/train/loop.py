"""The training loop: a generator that takes one optimizer step per `next`.

Dimensions in this file
    B   rows of a batch
    T   tokens of a row
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptbook import world
from mptbook.data.packing import IGNORE
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.train.guard import Guard


@dataclass(frozen=True)
class StepLog:
    step: int  # steps taken, this one included
    loss: float  # nats per target token
    grad_norm: float  # before clipping
    lr: float
    targets: int  # target tokens behind this step
    refused: str = ""  # why the step was not taken


def train_steps(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    steps: int,
    start: int = 0,
    accumulate: int = 1,
    clip: float = 1.0,
    precision: Precision = "auto",
    guard: Guard | None = None,
) -> Iterator[StepLog]:
    """Train `model`; yield a log after each step.

    The caller decides what happens between steps: print, plot, evaluate, save, stop. A step
    whose loss or gradient is not finite is never taken; its log says so.

    Args:
        model: an `MPT`, or any module that turns ids (B, T) into logits (B, T, V). Where several
            processes train together, one of `mptbook.fsdp.shard`.
        batches: yields (inputs, targets) or (inputs, targets, documents), int64 (B, T); a
            target of -100 costs nothing. Each process has rows of its own.
        schedule: learning rate for a step number, counted from 0. A parameter group with an
            `lr_factor` gets that multiple of it.
        steps: number of the last step, so that `steps - start` are taken.
        start: steps taken before, when a run is resumed.
        accumulate: batches per step. Losses are summed and divided by the number of
            targets of the whole step, over all processes, so short rows do not weigh more
            than long ones.
        clip: largest gradient norm allowed.
        precision: of products; see `mptbook.model.precision.autocast`.
        guard: refuses steps; None refuses only what is not finite.

    Raises:
        ValueError: if `precision` is unknown, or a step has no target at all.
    """
    device = model.device if isinstance(model, MPT) else next(model.parameters()).device
    computing = autocast(device, precision)
    guard = guard or Guard()
    for step in range(start, steps):
        model.train()
        group = [[part.to(device) for part in next(batches)] for _ in range(accumulate)]
        own_targets = sum(int((y != IGNORE).sum()) for _, y, *_ in group)
        targets = int(world.total([own_targets], device)[0])
        if targets == 0:
            raise ValueError(f"the batches of step {step + 1} have no target: all are {IGNORE}")
        losses = []
        for x, y, *documents in group:
            with computing:
                loss = sum_of_losses(model, x, y, *documents)
            (loss / targets).backward()
            losses.append(loss.detach())
        (loss,) = world.total([float(torch.stack(losses).sum() / targets)], device)
        weights = list(model.parameters())
        # Looked at before clipping, which would spread one NaN over every gradient.
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
        refused = guard.judge(loss, float(norm), device)
        lr = schedule(step)
        if not refused:
            nn.utils.clip_grads_with_norm_(weights, clip, norm)
            for params in optimizer.param_groups:
                _set_rate(params, lr * params.get("lr_factor", 1.0))
            optimizer.step()
        optimizer.zero_grad()
        yield StepLog(step + 1, loss, float(norm), lr, targets, refused)


def _set_rate(params: dict, rate: float) -> None:
    if isinstance(params["lr"], Tensor):  # that a compiled step has seen, and looks at again
        params["lr"].fill_(rate)
    else:
        params["lr"] = rate


def sum_of_losses(
    model: nn.Module, x: Tensor, y: Tensor, documents: Tensor | None = None
) -> Tensor:
    """Nats over all targets of a batch, a float32 scalar."""
    if isinstance(model, MPT):
        return model.loss(x, y, documents)
    logits = model(x) if documents is None else model(x, documents)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), y.flatten(), ignore_index=IGNORE, reduction="sum"
    )
