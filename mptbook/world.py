"""The processes that work together: which one this is, what all of them know, and who is missing.

torchrun starts the processes and tells each its place by environment variables. A program that
was started without it is a world of one, and nothing here costs it anything.

Dimensions in this file
    P   processes
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from mptbook.settings import Ended

T = TypeVar("T")
ROLL_CALL = timedelta(seconds=5)  # that a process has to say that it is there
FIRST_WORD = 30.0  # seconds that the process that tells of an error may be behind the others


class Missing(Ended):
    """A process that the others wait for has died or hangs."""

    code = 1


def launched() -> bool:
    """Whether torchrun started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks(error: Exception) -> bool:
    """Whether this process tells of an error: what happens to all is said once, and who is
    missing once a machine."""
    first = os.environ.get("RANK", "0") == "0"
    return first or (isinstance(error, Missing) and os.environ.get("LOCAL_RANK") == "0")


def wait_to_speak(error: Exception) -> None:
    """Leave an error to the process that tells of it, which may meet it later.

    torchrun ends all processes when the first one has failed: one that does not speak would take
    the word from the one that does. It waits, and is ended in its turn; where it is not, no other
    process met the error, and it tells of it itself.
    """
    if not speaks(error):
        time.sleep(FIRST_WORD)


def rank() -> int:
    """The place of this process, counted from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """P, the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def device(name: str = "auto") -> torch.device:
    """The device of this process: `cpu`, `cuda`, or `auto`, which takes CUDA where it is.

    Raises:
        ValueError: if CUDA is asked for and is not there, or has fewer devices than processes.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device is {name}; it must be auto, cpu, cuda or cuda:NUMBER")
    if name.startswith("cuda") and not cuda:
        raise ValueError(f"device is {name}, but no CUDA device is here; use --device cpu")
    if name == "cuda" and launched():
        local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if here > torch.cuda.device_count():
            raise ValueError(
                f"{here} processes of this machine have {torch.cuda.device_count()} CUDA devices; "
                "each needs its own, so take --nproc-per-node gpu"
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


@contextmanager
def joined(on: torch.device, seconds: float = 600) -> Iterator[None]:
    """Work together with the processes that torchrun has started; alone, just work.

    GPUs talk by NCCL, CPUs by gloo, which takes what is said about GPUs too.

    Args:
        on: the device of this process, from `device`.
        seconds: how long one waits for another before it is missing.

    Raises:
        ValueError: if some processes compute on GPUs and some do not, or torchrun shall start
            processes again and could not.
        Missing: if another process has died, or does not answer in time; it is named.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    _see_restarts()
    patience = timedelta(seconds=seconds)
    backends = "cpu:gloo,cuda:nccl" if on.type == "cuda" else "gloo"
    try:
        store, place, processes = next(dist.rendezvous("env://", timeout=patience))
        devices = _devices(store, place, processes, on.type)
        if len(set(devices)) == 1:
            how = {"store": store, "rank": place, "world_size": processes, "timeout": patience}
            dist.init_process_group(backends, **how)
            roll_call = group(seconds)
    except (RuntimeError, ValueError) as error:
        raise Missing(f"the processes did not find each other: {_first_line(error)}") from error
    if len(set(devices)) > 1:
        odd = devices.index(next(kind for kind in devices if kind != devices[0]))
        raise ValueError(
            f"process 0 computes on {devices[0]} and process {odd} on {devices[odd]}, which do "
            "not talk to each other; give all the same --device"
        )
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not _is_about_another(error):
            raise
        raise Missing(f"{_who_is_missing(roll_call)} ({_first_line(error)})") from error
    finally:
        dist.destroy_process_group()


def _devices(store: dist.Store, place: int, processes: int, own: str) -> list[str]:
    """The kind of device of each process, from the store: a group of two kinds would hang."""
    store.set(f"device of {place}", own)
    return [store.get(f"device of {other}").decode() for other in range(processes)]


def _see_restarts() -> None:
    """Refuse a restart that would not find together: torchrun keeps the addresses of processes
    that have died in the store that it shares with the new ones (pytorch#135712)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts} does not get over a killed process unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set before it; set it, or take "
            "--max-restarts 0"
        )


def group(seconds: float) -> dist.ProcessGroup:
    """All processes, for messages that must not meet those of others; all must call this.

    Args:
        seconds: how long one waits for another.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def _is_about_another(error: Exception) -> bool:
    """Whether an error says that another process did not do its part."""
    return isinstance(error, dist.DistError) or bool(re.search("gloo|NCCL", str(error)))


def _who_is_missing(roll_call: dist.ProcessGroup) -> str:
    try:
        dist.monitored_barrier(roll_call, timeout=ROLL_CALL, wait_all_ranks=True)
    except RuntimeError as error:
        named = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        if named:
            return (
                f"process {named[1]} of {size()} does not answer; look at its output and its "
                "machine, then start again with --resume"
            )
        if rank():
            return "another process died or does not answer; process 0 and torchrun say which"
        return "another process died; torchrun says which"
    return "a message between the processes was lost; start again with --resume"


def _first_line(error: Exception) -> str:
    """Without the place in PyTorch's own source."""
    return re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0])


def total(values: Sequence[float], on: torch.device | str = "cpu") -> list[float]:
    """The sum of each value over all processes.

    Args:
        on: where this process computes.
    """
    if size() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=on)
    dist.all_reduce(summed)
    return summed.tolist()


def all_say(so: bool) -> bool:
    """Whether it is so in every process."""
    return total([so]) == [size()]


def together(
    function: Callable[[], dict[str, T]], group: dist.ProcessGroup | None = None
) -> dict[str, T]:
    """The items of all processes in one.

    Raises:
        Exception: in every process what the function raises in one of them.
    """
    told: list = [_outcome(function)]
    if size() > 1:
        told = told * size()
        dist.all_gather_object(told, told[rank()], group=group)
    return {name: item for outcome in told for name, item in _result(outcome).items()}


def from_first(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What a function gives in process 0, in all of them; only there it is called.

    Raises:
        Exception: what the function raises, in every process.
    """
    if size() == 1:
        return function()
    told = [_outcome(function) if rank() == 0 else None]
    dist.broadcast_object_list(told, group=group, device=torch.device("cpu"))
    return _result(told[0])


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # raised again by `_result`, in every process
        return None, error


def _result(outcome: tuple[T, Exception | None]) -> T:
    result, error = outcome
    if error is not None:
        raise error
    return result
