"""`mptbook bench curriculum`: short rows, long rows, and short rows before long ones.

mpt-tiny trained four times on the same number of tokens: in rows of one length throughout; in
short rows and then in long ones; and the same with more code in the second stage, which is the
run of `configs/tiny-curriculum.toml`, MPT-30B's in small.
"""

import time
from pathlib import Path

from mptbook.bench.training import TrainingBench
from mptbook.data.curriculum import Stage
from mptbook.eval.perplexity import perplexity
from mptbook.settings import CONFIGS
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.course import staged_steps
from mptbook.train.heldout import front
from mptbook.train.pretrain import Pretrain
from mptbook.train.run import Run

SHORT, LONG, BOTH, MORE_CODE = "short", "long", "short, then long", "short, then long and code"
HELDOUT_CHARACTERS = 65_536  # of each domain


def recipe(data: Path) -> Pretrain:
    """The settings of `configs/tiny-curriculum.toml`."""
    return Pretrain.from_toml(CONFIGS / "tiny-curriculum.toml", data=data, out=data)


def stages(settings: Pretrain, steps: int) -> dict[str, list[Stage]]:
    """The stages of each training: `steps` steps in all, shared out as the recipe does."""
    first, second = settings.stages
    tokens = steps * settings.batch_tokens
    begin = round(steps * first.tokens / (first.tokens + second.tokens)) * settings.batch_tokens
    before = first.model_copy(update={"tokens": begin})
    after = second.model_copy(update={"tokens": tokens - begin})
    return {
        SHORT: [first.model_copy(update={"tokens": tokens})],
        LONG: [first.model_copy(update={"tokens": tokens, "row_tokens": second.row_tokens})],
        BOTH: [before, after.model_copy(update={"mixture": first.mixture})],
        MORE_CODE: [before, after],
    }


def compare(data: Path, *, steps: int = 1000, seeds: int = 2) -> dict:
    """Train mpt-tiny in each way.

    Args:
        data: a folder that `mptbook prepare` wrote, of the default domains.
        steps: of each training.
        seeds: trainings in each way; a seed sets the weights and the order of the rows.

    Returns:
        Settings, and for each way and seed: ``seconds``; ``bits_per_byte`` at the end, by row
        length and domain; and ``before``, the same after the first of two stages.

    Raises:
        ValueError: if the data lacks a domain of the recipe, or a row of the long length.
    """
    keep_freed_memory()
    settings = recipe(data)
    ways = stages(settings, steps)
    lengths = [stage.row_tokens for stage in settings.stages]
    warmup = min(settings.optim.warmup, steps // 10)
    optim = settings.optim.model_copy(update={"warmup": warmup})
    found: dict[str, list[dict]] = {name: [] for name in ways}
    for seed in range(seeds):
        for name, parts in ways.items():
            changes = {"steps": steps, "stages": parts, "seed": seed, "optim": optim}
            found[name].append(_trained(settings.model_copy(update=changes), lengths))
            _show(f"{name}, seed {seed}", found[name][-1])
    return {
        "steps": steps,
        "batch_tokens": settings.batch_tokens,
        "seeds": seeds,
        "stages": [stage.model_dump(exclude_none=True) for stage in ways[MORE_CODE]],
        "heldout_characters": HELDOUT_CHARACTERS,
        "trainings": found,
    }


def _show(name: str, training: dict) -> None:
    print(f"{name}: {training['seconds']:.0f} s", flush=True)
    for length, bits in training["bits_per_byte"].items():
        parts = "  ".join(f"{domain} {value:.3f}" for domain, value in bits.items())
        print(f"  rows of {length:6,}: {parts} bits per byte", flush=True)


def _trained(settings: Pretrain, lengths: list[int]) -> dict:
    """Train, and what came of it."""
    run = Run.make(settings)
    switch = (*run.feed.curriculum.starts[1:], 0)[0]
    found: dict = {}
    seconds, start = 0.0, time.perf_counter()
    for log in staged_steps(settings, run, 0):
        if log.step == switch:
            seconds += time.perf_counter() - start
            found["before"] = _bits(run, lengths)
            start = time.perf_counter()
    seconds += time.perf_counter() - start
    return found | {"seconds": seconds, "bits_per_byte": _bits(run, lengths)}


def _bits(run: Run, lengths: list[int]) -> dict[int, dict[str, float]]:
    """Bits per byte of the front of the held-out texts, by row length and domain."""
    texts = front(run.heldout, HELDOUT_CHARACTERS)
    return {
        length: {
            name: perplexity(
                run.model,
                run.tokenizer,
                part,
                row_tokens=length,
                batch_rows=16 * lengths[0] // length,
            ).bits_per_byte
            for name, part in texts.items()
        }
        for length in lengths
    }


class BenchCurriculum(TrainingBench):
    """Train in rows of one length and in stages: `mptbook bench curriculum`."""

    def compare(self) -> dict:
        return compare(self.data, steps=self.steps, seeds=self.seeds)
