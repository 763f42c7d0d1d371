"""What a run writes down: one JSON object a line in `log.jsonl`, and lines for people.

Every line has a `kind` and a `step`. A `step` line has loss (nats per token), grad_norm, lr,
targets, seconds since the run began or was resumed, and refused: why the step was not taken, or
""; what is not finite is null. The others:

    started    resumed: whether it goes on from a checkpoint, precision: of products
    gathered   of a finetuning: conversations, heldout, filling, left_out: of bad rows, overlaps
    stage      at the step before it: row_tokens, batch_tokens, domains: what it takes of each
    rollback   to: the step gone back to, skipped: places of the batches left out, reason
    heldout    bits_per_byte of the front of each domain's held-out text or answers, and by domains
    sample     prompt, text
    saved      path of a checkpoint; unsaved: error, why it could not be written
    damaged    path of a checkpoint passed over, what is wrong with it
    stopped    by: the signal
    final      bits_per_byte of all held-out text, and by domains
"""

import json
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mptbook.data.curriculum import Stage
from mptbook.data.loader import Drawn
from mptbook.train.loop import StepLog

SECONDS_BETWEEN_LINES = 10  # where the output is not a terminal


def read_log(run: str | Path, kind: str) -> list[dict]:
    """The lines of one kind from the log of a run directory, in order of their steps.

    After a resume or a rollback steps are taken again: the later line counts.

    Raises:
        FileNotFoundError: if there is no log.
    """
    last = {line["step"]: line for line in read_history(run) if line["kind"] == kind}
    return [last[step] for step in sorted(last)]


def read_history(run: str | Path) -> list[dict]:
    """All lines of the log in the order in which they were written.

    Raises:
        FileNotFoundError: if there is no log.
    """
    path = Path(run) / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; is {run} a run of mptbook pretrain?")
    return [json.loads(line) for line in _whole_lines(path.read_bytes()).splitlines()]


def _whole_lines(text: bytes) -> bytes:
    """Without the part of a line that a killed process left at the end."""
    return text[: text.rfind(b"\n") + 1]


class RunLog:
    """Writes `log.jsonl`, and shows progress: a bar on a terminal, else a line now and then.

    Args:
        run: the run directory.
        steps: steps of the whole run.
        start: steps taken before a resume.
        quiet: neither write nor show anything, as all processes but the first do.
    """

    def __init__(self, run: Path, steps: int, start: int = 0, quiet: bool = False) -> None:
        path = Path(os.devnull) if quiet else run / "log.jsonl"
        if path.exists() and not quiet:
            with path.open("rb+") as torn:
                torn.truncate(len(_whole_lines(path.read_bytes())))
        # Line by line, so that a killed run has lost nothing that it said.
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._begin = self._last_line = time.monotonic()
        self._steps, self._taken = steps, 0
        self._losses: deque[float] = deque(maxlen=50)
        self._tokens = 0
        self._quiet, self._terminal = quiet, sys.stdout.isatty() and not quiet
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), transient=True
        )
        self._task = self._bar.add_task("", total=steps, completed=start)
        if self._terminal:
            self._bar.start()

    def step(self, log: StepLog) -> None:
        seconds = time.monotonic() - self._begin
        self.event("step", log.step, seconds=round(seconds, 3), **_without_step(log))
        self._taken += 1
        self._tokens += log.targets
        if log.refused:
            self.say(f"step {log.step:,}  not taken: {log.refused}")
        else:
            self._losses.append(log.loss)
        loss = sum(self._losses) / max(1, len(self._losses))
        line = (
            f"step {log.step:,} of {self._steps:,}  loss {loss:.3f} nats/token  "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        if self._terminal:
            self._bar.update(self._task, completed=log.step, description=line)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            left = seconds / self._taken * (self._steps - log.step)
            self._print(f"{line}  {left:.0f} s left")
            self._last_line = time.monotonic()

    def stage(self, first: int, stage: Stage, domains: list[Drawn]) -> None:
        """What a stage is going to read; `first` is the step before it."""
        lengths = {"row_tokens": stage.row_tokens, "batch_tokens": stage.batch_tokens}
        self.event("stage", first, **lengths, domains=[vars(domain) for domain in domains])
        parts = ", ".join(
            f"{domain.name} {domain.share:.1%} ({domain.epochs:.2f} epochs)" for domain in domains
        )
        self.say(
            f"step {first:,}  {stage.tokens:,} tokens in rows of {stage.row_tokens:,}, "
            f"{stage.batch_tokens:,} a step: {parts}"
        )

    def heldout(self, kind: str, step: int, total: float, domains: dict[str, float]) -> None:
        self.event(kind, step, bits_per_byte=total, domains=domains)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in domains.items())
        what = "all held out" if kind == "final" else "held out"
        self.say(f"step {step:,}  {what}: {total:.3f} bits per byte ({parts})")

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.event("sample", step, prompt=prompt, text=text)
        self.say(f"step {step:,}  {prompt}|{text}".replace("\n", " / "))

    def event(self, kind: str, step: int, **what) -> None:
        """One line of `log.jsonl`."""
        line = json.dumps({"kind": kind, "step": step, **_finite(what)}, allow_nan=False)
        self._file.write(line + "\n")

    def say(self, line: str) -> None:
        """A line for people that the progress bar does not overwrite."""
        if self._terminal:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            self._print(line)

    def _print(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._terminal:
            self._bar.stop()
        self._file.close()


def _finite(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_step(log: StepLog) -> dict:
    return {key: value for key, value in vars(log).items() if key != "step"}
