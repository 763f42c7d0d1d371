"""A contestant of `mptbook bench speedrun`: it trains for a budget of seconds, slice by slice.

Only training counts, with the fetching of batches. The learning rate follows the part of the
budget that is used up, so that a schedule ends with the time, however long a step takes.

Dimensions in this file
    B   rows of a batch
    T   tokens of a row
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from mptbook.bench.measure import synchronize
from mptbook.bench.peers import OURS, make_model, plain_steps
from mptbook.data.loader import batches
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.heldout import front
from mptbook.train.loop import StepLog, train_steps
from mptbook.train.optimizer import Optim, make_optimizer
from mptbook.train.pretrain import Pretrain
from mptbook.train.run import Run

SCHEDULE_STEPS = 10_000  # into which a schedule cuts the budget
EVALUATION_ROWS = 16  # at a time, for every model


@dataclass(frozen=True)
class Entry:
    """Who trains, at which peak learning rate and how long."""

    label: str  # of this training
    contestant: str  # `OURS` or one of `PEERS`
    lr: float
    budget: float  # seconds of training


def peer_optim(lr: float) -> Optim:
    """How a peer is trained: AdamW, and the schedule that is transformers' default, linear."""
    return Optim(
        name="adamw",
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        schedule="linear",
        warmup=SCHEDULE_STEPS // 20,
        floor=0.0,
        clip=1.0,
    )


def scheduled(settings: Pretrain) -> Optim:
    """The optimizer of a recipe, its warm-up the same part of `SCHEDULE_STEPS` as of its steps."""
    warmup = round(settings.optim.warmup / settings.steps * SCHEDULE_STEPS)
    return settings.optim.model_copy(update={"warmup": warmup})


class Racer:
    """The model of an entry on its way; what it is asked is the name of a method.

    Args:
        settings: the recipe, with a folder of prepared rows. mptbook trains by it; of it a peer
            has the shape of the model, the rows, their order and the tokens of a batch. There
            are no checkpoints to go back to: after steps that the guard refuses it goes on.
        characters: of each domain that `look` reads for "front".
    """

    def __init__(self, entry: Entry, settings: Pretrain, characters: int) -> None:
        run = Run.make(settings)
        self.heldout = {"front": front(run.heldout, characters), "all": run.heldout}
        self.tokenizer = run.tokenizer
        self.batch_tokens = settings.batch_tokens
        self.budget, self.seconds = entry.budget, 0.0
        self.steps = self.refused = 0
        optim = scheduled(settings) if entry.contestant == OURS else peer_optim(entry.lr)
        self._rates = optim.rates(SCHEDULE_STEPS)
        if entry.contestant == OURS:
            self.model, self.optimizer = run.model, run.optimizer
            self._logs = self._by_recipe(run, settings)
        else:
            torch.manual_seed(settings.seed)
            self.model = make_model(entry.contestant, run.model.config).to(run.model.device)
            self.optimizer = make_optimizer(self.model, optim)
            (rows,) = run.feed.rows
            n_rows = settings.batch_tokens // rows.row_tokens
            stream = batches(rows, n_rows, seed=settings.seed)
            self._logs = plain_steps(
                self.model, stream, self.optimizer, self._rate, clip=optim.clip
            )

    def about(self) -> dict:
        """What is known before the first step."""
        return {"parameters": sum(weight.numel() for weight in self.model.parameters())}

    def train(self, seconds: float) -> dict:
        """Train until so many seconds more, or the budget, are used up.

        Ends after the step that reaches them.

        Returns:
            How far it is: `seconds`, `steps` and `tokens` of training since the start, `refused`
            steps among them, and `loss`, the mean of this slice in nats per token (None where it
            is not finite).
        """
        end = min(self.seconds + seconds, self.budget)
        losses = []
        while self.seconds < end:
            start = perf_counter()
            log = next(self._logs)
            synchronize()
            self.seconds += perf_counter() - start
            self.steps += 1
            self.refused += bool(log.refused)
            losses.append(log.loss)
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens": self.steps * self.batch_tokens,
            "refused": self.refused,
            "loss": _finite(statistics.fmean(losses)),
        }

    def look(self, which: str) -> float | None:
        """Bits per byte of the "front" or of "all" of the held-out text; None if not finite."""
        found = [
            perplexity(self.model, self.tokenizer, texts, batch_rows=EVALUATION_ROWS)
            for texts in self.heldout[which].values()
        ]
        return _finite(sum(found, start=Prediction(0.0, 0, 0)).bits_per_byte)

    def _rate(self, _step: int) -> float:
        place = int(self.seconds / self.budget * SCHEDULE_STEPS)
        return self._rates(min(place, SCHEDULE_STEPS - 1))

    def _by_recipe(self, run: Run, settings: Pretrain) -> Iterator[StepLog]:
        return train_steps(
            run.model,
            run.feed.batches(0, end_of_text=run.end_of_document),
            run.optimizer,
            self._rate,
            steps=sys.maxsize,
            accumulate=run.feed.accumulate(0),
            clip=settings.optim.clip,
            precision=settings.precision,
            guard=run.guard,
        )


def start_racer(entry: Entry, settings: Pretrain, characters: int) -> Callable:
    """A `Racer` as a `Worker` needs it: a function of a method's name and its arguments.

    The allocator of mptbook's process is set as `mptbook pretrain` sets it.
    """
    if entry.contestant == OURS:
        keep_freed_memory()
    racer = Racer(entry, settings, characters)
    return lambda question, *arguments: getattr(racer, question)(*arguments)


def _finite(number: float) -> float | None:
    """JSON has no NaN."""
    return number if math.isfinite(number) else None
