"""Checkpoints of a run: everything that the next step depends on, in `step-000480/`.

Each holds the files of a `Snapshot` and a `SHA256SUMS`, a digest of every file, as
`sha256sum --check` reads it. It is written under another name, synchronised to the disk and
renamed when it is whole, so a killed run never leaves half of one under its final name. What the
disk does to it later, the digests tell.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import torch.distributed as dist
from pydantic import Field
from pydantic_settings import CliPositionalArg

from mptbook import world
from mptbook.directory import require_absent
from mptbook.settings import RunSettings
from mptbook.train.snapshot import Snapshot, consolidate

NAME = re.compile(r"step-(\d{6,})")
SUMS = "SHA256SUMS"


def write_checkpoint(
    snapshot: Snapshot, run: Path, keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write `run/step-...`, then remove all but the newest `keep` checkpoints.

    Args:
        group: of all processes, for nothing else at the time; None for a process alone.

    Raises:
        OSError: in every process, if it cannot be written; those before it are still there.
    """
    final = run / f"step-{snapshot.step:06d}"
    partial = run / f"partial-{snapshot.step:06d}"

    def begin() -> None:
        remove_partial(run)
        partial.mkdir(parents=True)

    def end() -> None:
        for name in sums:
            if not (partial / name).is_file():
                raise OSError(
                    f"{partial / name} was written by another process and is not seen here; the "
                    "run directory must lie on a disk that all machines share"
                )
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        (partial / SUMS).write_text("".join(lines))
        for file in [*partial.iterdir(), partial]:
            _synchronize(file)
        assert not final.exists(), f"{final} is there, but the run had not come so far"
        partial.rename(final)
        _synchronize(run)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)

    try:
        world.from_first(begin, group)
        snapshot.write(partial, group)
        sums = world.together(lambda: _own_sums(partial), group)
        world.from_first(end, group)
    except OSError:
        if world.rank() == 0:
            remove_partial(run)  # to give back the room it took
        raise
    return final


def _own_sums(partial: Path) -> dict[str, str]:
    """The digests of the files that this process wrote; the first looks at all but parts."""
    own = f"shard-{world.rank() + 1:05d}-"
    files = [
        file
        for file in partial.iterdir()
        if file.name.startswith(own) or (world.rank() == 0 and not file.name.startswith("shard-"))
    ]
    return {file.name: _digest(file) for file in files}


class Writer:
    """Writes snapshots in a thread of its own while training goes on.

    Args:
        run: the run directory.
        keep: checkpoints kept there, the newest ones.
        seconds: how long a process waits for another.
    """

    def __init__(self, run: Path, keep: int, seconds: float = 600) -> None:
        self._run, self._keep = run, keep
        # The threads of all processes talk to each other while training does.
        self._group = world.group(seconds) if world.size() > 1 else None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[Path]] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must have been asked for by `outcomes`."""
        assert self._pending is None
        future = self._pool.submit(write_checkpoint, snapshot, self._run, self._keep, self._group)
        self._pending = snapshot.step, future

    def outcomes(self, wait: bool = False) -> Iterator[tuple[int, Path | OSError]]:
        """The step of a checkpoint and where it lies, or why it could not be written; once.

        Args:
            wait: for the end of one that is being written.
        """
        if self._pending is None or not (wait or world.all_say(self._pending[1].done())):
            return
        step, future = self._pending
        self._pending = None
        try:
            yield step, future.result()
        except OSError as error:
            yield step, error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()  # what has begun is finished


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones among them."""
    found = [path for path in run.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The steps taken before a checkpoint."""
    return int(NAME.fullmatch(path.name)[1])


def remove_partial(run: Path) -> None:
    """Remove what killed processes left half written."""
    for pattern in ("partial-*", ".partial-*", ".model-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path)


def damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; "" if nothing is."""
    sums = path / SUMS
    if not sums.is_file():
        return f"{SUMS} is missing"
    listed = set()
    for line in sums.read_bytes().decode(errors="replace").removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or Path(name).name != name:
            return f"{SUMS} is damaged"
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not as it was written"
        listed.add(name)
    present = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    unlisted = present - listed - {SUMS}
    if unlisted or "state.json" not in listed:
        return f"{SUMS} lacks {min(unlisted or {'state.json'})}"
    return ""


def newest_good(run: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and the damaged ones after it with what is wrong.

    Returns:
        None for a run that has no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints, but none is good.
    """
    damaged = []
    for path in reversed(checkpoints(run)):
        what = damage(path)
        if not what:
            return path, damaged
        damaged.append((path, what))
    if damaged:
        every = "; ".join(f"{path.name}: {what}" for path, what in damaged)
        raise ValueError(
            f"{run} has no checkpoint that is whole ({every}); start again with another --out"
        )
    return None, []


def good_before(run: Path, at_most: int) -> Path:
    """The newest checkpoint that is whole of a step up to `at_most`; else the oldest one.

    Raises:
        ValueError: if no checkpoint is good.
    """
    good = [path for path in checkpoints(run) if not damage(path)]
    if not good:
        raise ValueError(f"{run} has no checkpoint that is whole; start again with another --out")
    early = [path for path in good if step_of(path) <= at_most]
    return early[-1] if early else good[0]


def tidy(run: Path, damaged: list[tuple[Path, str]]) -> None:
    """Give damaged checkpoints another name, and remove half written ones."""
    for path, _ in damaged:
        target = path.with_name(f"damaged-{path.name}")
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)
    remove_partial(run)


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for newer in checkpoints(run):
        if step_of(newer) > step:
            shutil.rmtree(newer)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _synchronize(path: Path) -> None:
    """Have the disk hold what was written, before a rename says that it does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Consolidate(RunSettings):
    """Make a model directory of a checkpoint: `mptbook consolidate RUN/step-... --out DIR`."""

    checkpoint: CliPositionalArg[Path] = Field(description="step-... folder of a run")
    out: Path = Field(description="model directory to write")

    def run(self) -> None:
        require_absent(self.out)
        if (self.checkpoint / "state.json").is_file() and (what := damage(self.checkpoint)):
            raise ValueError(f"{self.checkpoint} is damaged: {what}; take another checkpoint")
        consolidate(self.checkpoint, self.out)
        print(f"model directory: {self.out}")
