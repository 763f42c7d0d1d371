"""How every bench measures: interleaved, medians, with the machine it ran on beside the figures."""

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

import torch
from pydantic import Field

from mptbook.settings import RunSettings

LIBRARIES = ("torch", "transformers", "tokenizers", "flash-attn")


class Bench(RunSettings):
    """What every bench can be told, and how it ends.

    A subclass lists its settings and has its figures in `compare`.
    """

    out: Path | None = Field(None, description="where to write the figures as JSON")

    def compare(self) -> dict:
        """Measure, print, and return the figures, as JSON has them."""
        raise AssertionError(f"{type(self).__name__} does not say what it compares")

    def run(self) -> None:
        results = {"machine": machine()} | self.compare()
        if self.out is not None:
            save(results, self.out)
            print(f"written to {self.out}")


def medians(runs: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Seconds that each function takes, the median of `repeats` rounds; see `in_turns`."""
    return {name: statistics.median(each) for name, each in in_turns(runs, repeats).items()}


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds that each function takes, in each of `repeats` rounds.

    Every function is called once before the clock starts. A round then calls each in turn, so
    that what slows the machine for a while slows all of them.

    Args:
        runs: name to a function without arguments; its result is dropped.
        repeats: rounds, at least 1.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in rotated(runs, turn):
            start = time.perf_counter()
            runs[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The names in their order, each turn beginning with the next: none is always first."""
    names = list(names)
    first = turn % max(1, len(names))
    return names[first:] + names[:first]


def noise(values: list[float]) -> float | None:
    """Half the distance between the quartiles, over the median; None of a single value.

    Quartiles lie between neighbours, as `statistics.quantiles` has it with "inclusive".
    """
    if len(values) < 2:
        return None
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / 2 / median


def synchronize() -> None:
    """Wait for a GPU, where there is one; a CPU has done its work when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(function: Callable[..., object], *arguments) -> int:
    """Bytes that a call adds to the resident memory of a fresh process, at the peak.

    Reads Linux's account of a process.

    Args:
        function: a function of a module, called with `arguments` in a process of its own; the
            last is a size, and a call with 16 goes before the one that is measured.

    Raises:
        MemoryError: if the process ends before the call returns.
    """
    context = get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(send, function, arguments))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        raise MemoryError(
            f"{function.__name__}{arguments} ended with exit code {process.exitcode}"
        ) from None
    finally:
        process.join()


def _report_peak(send, function, arguments) -> None:
    function(*arguments[:-1], 16)  # what libraries load at the first call is not the function's
    added = added_memory()
    function(*arguments)
    send.send(added())


def added_memory() -> Callable[[], int]:
    """A function that says how many bytes this process has added since, at the peak.

    The peak of its resident memory over what is resident now, from Linux's account of it.
    """
    before = process_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    return lambda: process_bytes("VmHWM") - before


def process_bytes(name: str) -> int:
    """Bytes of a line of Linux's /proc/self/status.

    Args:
        name: VmRSS is what is resident, VmHWM its peak, VmData what was asked for.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


def machine() -> dict[str, object]:
    """What the figures were measured on, and when."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "matrix units": bool(torch.cpu._is_amx_tile_supported()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": found,
        "command": " ".join(["mptbook", *sys.argv[1:3]]),  # what follows are paths and sizes
    }


def cpu_name() -> str:
    """As the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save(results: dict, path: Path) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
