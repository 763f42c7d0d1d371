"""Checkpoints of a run: everything that the next step depends on, in `step-000480/`.

Each is a model directory with three files more:

    optimizer.safetensors   the optimizer's state by the name of the weight, and the random state
    state.json              the step, the guard's state, what the run was made with
    SHA256SUMS              a digest of every file, as `sha256sum --check` reads it

It is written under another name, synchronised to the disk and renamed when it is whole, so a
killed run never leaves half of one under its final name. What the disk does to it later, the
digests tell. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from mptbook.directory import load_model, save_model, write_tensors
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer

FORMAT = 2
NAME = re.compile(r"step-(\d{6,})")
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Snapshot:
    """A run as it was after a step, in memory of its own."""

    step: int
    model: MPT
    tensors: dict[str, Tensor]  # of the optimizer, and random states
    tokenizer: Tokenizer
    state: dict

    @classmethod
    def take(
        cls,
        step: int,
        model: MPT,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        guard: Mapping,
        made_with: Mapping,
    ) -> Self:
        """Copy what training is about to change.

        Args:
            guard: `Guard.state_dict()`.
            made_with: what must be equal at a resume, as JSON has it.
        """
        with torch.device("meta"):
            copied = MPT(model.config)
        weights = {name: _copy(weight) for name, weight in model.state_dict().items()}
        copied.load_state_dict(weights, assign=True)
        tensors = {
            f"{name}:{key}": _copy(value)
            for name, weight in model.named_parameters()
            for key, value in optimizer.state[weight].items()
        }
        state = {"format": FORMAT, "step": step, "guard": guard, "made_with": made_with}
        return cls(step, copied, tensors | _random_states(), tokenizer, state)

    def write(self, run: Path, keep: int) -> Path:
        """Write `run/step-...`, then remove all but the newest `keep` checkpoints.

        Raises:
            OSError: if it cannot be written; the checkpoints before it are still there.
        """
        final = run / f"step-{self.step:06d}"
        partial = run / f"partial-{self.step:06d}"
        remove_partial(run)
        try:
            save_model(self.model, partial, self.tokenizer)
            write_tensors(self.tensors, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(self.state, indent=1) + "\n")
            sums = [f"{_digest(file)}  {file.name}\n" for file in sorted(partial.iterdir())]
            (partial / SUMS).write_text("".join(sums))
            for file in [*partial.iterdir(), partial]:
                _synchronize(file)
        except OSError:
            remove_partial(run)  # to give back the room it took
            raise
        assert not final.exists(), f"{final} is there, but the run had not come so far"
        partial.rename(final)
        _synchronize(run)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
        return final


class Writer:
    """Writes snapshots in a thread of its own while training goes on.

    Args:
        run: the run directory.
        keep: checkpoints kept there, the newest ones.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[Path]] | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Begin to write; the one before must have been asked for by `outcomes`."""
        assert self._pending is None
        future = self._pool.submit(snapshot.write, self._run, self._keep)
        self._pending = snapshot.step, future

    def outcomes(self, wait: bool = False) -> Iterator[tuple[int, Path | OSError]]:
        """The step of a checkpoint and where it lies, or why it could not be written; once.

        Args:
            wait: for the end of one that is being written.
        """
        if self._pending is None or not (wait or self._pending[1].done()):
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


def load_checkpoint(
    path: Path, model: MPT, optimizer: torch.optim.Optimizer, made_with: Mapping
) -> dict:
    """Restore weights, optimizer and random state in place.

    Args:
        made_with: as for `Snapshot.take`.

    Returns:
        The checkpoint's state: ``step`` and ``guard`` among others.

    Raises:
        ValueError: if the checkpoint is of a newer format, of a model of another shape, or was
            made with something else; model and optimizer are as they were.
    """
    state = json.loads((path / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {state['format']}, this version of mptbook reads format {FORMAT}; "
            "resume with the version that wrote it"
        )
    saved = load_model(path)
    if saved.config != model.config:
        raise ValueError(
            f"{path} holds a model of another shape ({_difference(saved.config, model.config)}); "
            "resume with the settings in run.toml"
        )
    for name, value in made_with.items():
        then = state["made_with"].get(name)
        if then != value:
            raise ValueError(
                f"{path} was made with {name}={str(then)[:12]} and not {str(value)[:12]}; resume "
                "with the settings in run.toml, or choose another --out"
            )
    model.load_state_dict(saved.state_dict())
    tensors = load_file(path / "optimizer.safetensors")
    _restore_random_states(tensors)
    for name, weight in model.named_parameters():
        prefix = f"{name}:"
        optimizer.state[weight] = {
            key.removeprefix(prefix): _like(value, weight)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    return state


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """State lives where its weight does; AdamW's counter of steps stays on the CPU."""
    return value.to(weight.device) if value.dim() else value.clone()


def _random_states() -> dict[str, Tensor]:
    states = {"random:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for n, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"random:cuda:{n}"] = state
    return states


def _restore_random_states(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random:cpu"])
    for n in range(torch.cuda.device_count()):
        if f"random:cuda:{n}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random:cuda:{n}"], n)


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


def _difference(a, b) -> str:
    return ", ".join(
        f"{name} {getattr(a, name)} and not {getattr(b, name)}"
        for name in vars(a)
        if getattr(a, name) != getattr(b, name)
    )
