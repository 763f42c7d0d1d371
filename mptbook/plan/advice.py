"""What to change about a plan that does not fit, each proposal computed."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from mptbook.model.config import MPTConfig
from mptbook.plan.costs import GIB, GPUS
from mptbook.plan.memory import Setup, longest_row, memory, shortage

SMALLEST = (  # what takes the least memory
    ("recompute", 1, "--recompute block"),
    ("precision", "pure", "--precision pure"),
    ("optimizer", "lion", "--optimizer lion"),
)
MOST_GPUS = 4096
NODE = 8  # machines have so many; beyond one, they are rented whole


def misfit(config: MPTConfig, setup: Setup, gpu: str, name: str = "the model") -> str:
    """Why not even one row fits: by how much, and each single change with which it would."""
    card = GPUS[gpu]
    need, short = memory(config, setup, 1)["total"], shortage(config, setup, card)
    return (
        f"{name} does not fit {setup.gpus} x {gpu}: one row of {setup.row_tokens:,} tokens needs "
        f"{need / GIB:.1f} GiB on each, {short / GIB:.1f} GiB more than the "
        f"{(need - short) / GIB:.1f} that are free; it would fit with "
        f"{_advice(config, setup, gpu)}"
    )


def _advice(config: MPTConfig, setup: Setup, gpu: str) -> str:
    found = list(ways_out(config, setup, gpu))
    least = replace(setup, **{field: value for field, value, _ in SMALLEST})
    flags = [flag for field, value, flag in SMALLEST if getattr(setup, field) != value]
    if flags and not set(flags) & set(found):  # what no flag does alone they may do together
        together = " ".join(flags)
        if shortage(config, least, GPUS[gpu]) <= 0:
            found.append(together)
        else:
            more = [way for way in ways_out(config, least, gpu) if way not in found]
            found += [f"{together} and {way}" for way in more[:1]]
    return ", or ".join(found) or "nothing that a plan can change: take a smaller model"


def ways_out(config: MPTConfig, setup: Setup, gpu: str) -> Iterator[str]:
    """Single changes after which one row fits, in words."""

    def fits(changed: Setup, card: str = gpu) -> bool:
        return shortage(config, changed, GPUS[card]) <= 0

    for field, value, flag in SMALLEST:
        if getattr(setup, field) != value and fits(replace(setup, **{field: value})):
            yield flag
    if setup.shards and fits(replace(setup, shards=None)):
        yield "--shards left out"
    most = replace(setup, gpus=MOST_GPUS, shards=None)
    if fits(most):
        enough = _least(lambda n: fits(replace(setup, gpus=n, shards=None)), setup.gpus, MOST_GPUS)
        if enough > NODE:
            enough = -(-enough // NODE) * NODE
        if enough > setup.gpus:
            yield f"{enough} GPUs"
    larger = sorted((one.memory_bytes, name) for name, one in GPUS.items() if fits(setup, name))
    if larger:
        yield larger[0][1]
    if longest := longest_row(config, setup, GPUS[gpu]):
        yield f"rows of {longest // 128 * 128 or longest:,} tokens"


def _least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number that fits, where `high` does and larger ones are never worse."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
