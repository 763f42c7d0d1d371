"""`mptbook bench context`: tokens per second of training on longer and longer rows.

Each measurement is made in a fresh process, one process at a time, so that all the memory can
be had by one contestant; rounds still go from one contestant to the next. A contestant leaves
when it cannot hold a length in the memory it is given, or when a step of it takes too long.
Memory is limited and counted by Linux.
"""

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from mptbook.bench.measure import machine, rotated, save
from mptbook.bench.peers import LLAMA, MPT_PEER, OURS
from mptbook.bench.steps import Step, StepBench, contestant, figures, no_room
from mptbook.bench.workers import Worker

NAMES = (OURS, MPT_PEER, LLAMA)  # GPT-2 has no more positions than it was made with
WARM_STEPS = 1  # of each process, not timed


class BenchContext(StepBench):
    """Training on longer and longer rows: `mptbook bench context`."""

    tokens: list[PositiveInt] = Field(
        [512, 1024, 2048, 4096, 8192, 16_384, 32_768], description="tokens of a row, ascending"
    )
    batch_tokens: PositiveInt = Field(8192, description="tokens of a step; one row if it is longer")
    repeats: PositiveInt = Field(3, description="rounds; the median is taken")
    memory_gb: PositiveFloat = Field(
        16, description="for model, optimizer and step of a contestant, 10^9 bytes"
    )
    longest_seconds: PositiveFloat = Field(
        120, description="of a step; a contestant ends with one that takes longer"
    )

    def run(self) -> None:
        results = {"machine": machine(), "settings": self.model_dump(mode="json", exclude={"out"})}
        print(
            f"on {results['machine']['cpu']}, {torch.get_num_threads()} threads, {self.precision}"
        )
        results |= self.compare()
        if self.out is not None:
            save(results, self.out)
            print(f"written to {self.out}")

    def compare(self) -> dict:
        """``contestants``: name to length to figures, None where there are none.

        ``ended``: for each that left early the length and the reason.
        """
        found: dict[str, dict] = {name: {} for name in NAMES}
        ended: dict[str, dict] = {}
        print(
            f"\n{'tokens':>7}  {'':20} {'ms':>9} {'noise':>6} {'tokens/s':>9} {'bytes/token':>11}"
        )
        for tokens in sorted(self.tokens):
            rows = max(1, self.batch_tokens // tokens)
            steps, reasons = self.take_turns(tokens, rows, [n for n in NAMES if n not in ended])
            for name in NAMES:
                taken = steps.get(name)
                found[name][str(tokens)] = figures(taken, rows * tokens) if taken else None
                if name in reasons:
                    ended[name] = {"tokens": tokens, "reason": reasons[name]}
                if name in steps:
                    show(name, tokens, found[name][str(tokens)], reasons.get(name))
        return {"contestants": found, "ended": ended}

    def take_turns(
        self, tokens: int, rows: int, names: list[str]
    ) -> tuple[dict[str, list[Step]], dict[str, str]]:
        """Steps of each contestant on rows of one length, and why some of them ended."""
        steps: dict[str, list[Step]] = {name: [] for name in names}
        reasons: dict[str, str] = {}
        for turn in range(self.repeats):
            for name in rotated([name for name in names if name not in reasons], turn):
                step, reason = self.one_step(name, tokens, rows)
                steps[name] = [*steps[name], step] if step else []
                if reason:
                    reasons[name] = reason
        return steps, reasons

    def one_step(self, name: str, tokens: int, rows: int) -> tuple[Step | None, str]:
        """A step in a fresh process after its warm-up, and why the contestant ends, or "".

        There is no step if it does not fit; if it takes too long it is the first of all.
        """
        what = self.config(tokens), rows, self.precision, self.memory_gb
        with Worker(name, contestant, name, *what) as worker:
            for _ in range(WARM_STEPS + 1):
                try:
                    step = worker.ask()
                except RuntimeError as error:
                    if not no_room(error):
                        raise
                    return None, f"{error} (memory_gb={self.memory_gb:g})"
                if step.seconds > self.longest_seconds:
                    limit = f"longest_seconds={self.longest_seconds:g}"
                    return step, f"a step took {step.seconds:.0f} s, more than {limit}"
        return step, ""


def show(name: str, tokens: int, found: dict | None, reason: str | None) -> None:
    """Print the figures of one contestant on rows of one length."""
    line = f"{tokens:7,}  {name:20}"
    if found is not None:
        spread = "" if found["noise"] is None else f"{found['noise']:.1%}"
        line += (
            f" {found['median_seconds'] * 1e3:9,.0f} {spread:>6} "
            f"{found['tokens_per_second']:9,.0f} {found['bytes_per_token']:11,.0f}"
        )
    print(line, flush=True)
    if reason is not None:
        print(f"{'':9}ended: {reason}", flush=True)
