"""The directory that a run lives in."""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import tomli_w

from mptbook import world
from mptbook.settings import RunSettings

LOCK = ".lock"
PARTIAL = "run.toml.partial"


def claim(settings: RunSettings) -> None:
    """Make the run directory `out`, or see that it may be gone on with; for one process to call.

    Raises:
        FileExistsError: if it holds a run and `resume` is not set, or holds something else.
        ValueError: if it holds a run of another verb.
    """
    out, resume = settings.out, settings.resume
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    names -= {LOCK, PARTIAL}  # all that a run killed at its very start leaves
    started = "run.toml" in names
    if names and not (started and resume):
        way_out = "go on with --resume" if started else "it is not a run"
        raise FileExistsError(f"{out} is not empty; {way_out}, or choose another --out")
    if started:
        begun = tomllib.loads((out / "run.toml").read_text(encoding="utf-8"))
        for name in begun.keys() - type(settings).model_fields.keys():
            raise ValueError(
                f"{out} was begun with {name}={begun[name]}, which this verb does not have; go on "
                "with the verb that began it, or choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs from writing to a run directory; a killed one does not.

    Raises:
        FileExistsError: if another is writing to it.
    """
    lock = filelock.FileLock(out / LOCK)  # of the first process, for all
    world.from_first(lambda: _acquire(lock, out))
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: filelock.FileLock, out: Path) -> None:
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FileExistsError(
            f"another process is writing to {out}; wait for it, or choose another --out"
        ) from None


def write_settings(out: Path, settings: RunSettings) -> None:
    """`run.toml`: with it `mptbook pretrain --config` repeats the run."""
    how = {"resume", "until", "supervise", "restarts", "silence"}
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude=how, exclude_none=True))
    partial = out / PARTIAL
    partial.write_text(text)
    partial.replace(out / "run.toml")
