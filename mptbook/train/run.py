"""What a run consists of, and the directory that it lives in."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import filelock
import tomli_w
import torch

from mptbook.data.loader import Rows
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.checkpoint import (
    Snapshot,
    checkpoints,
    damage,
    load_checkpoint,
    remove_partial,
    step_of,
)
from mptbook.train.guard import Guard
from mptbook.train.heldout import load_heldout
from mptbook.train.optimizer import make_optimizer

if TYPE_CHECKING:
    from mptbook.train.pretrain import Pretrain

LOCK = ".lock"
PARTIAL = "run.toml.partial"


@dataclass
class Run:
    """The parts of a run of `mptbook pretrain`."""

    rows: Rows
    tokenizer: Tokenizer
    heldout: dict[str, list[str]]
    model: MPT
    optimizer: torch.optim.Optimizer
    guard: Guard
    rows_at_once: int
    accumulate: int  # micro-batches of a step
    made_with: dict  # what a resume must find unchanged

    @classmethod
    def make(cls, settings: "Pretrain") -> Self:
        """The parts as they are before the first step.

        Raises:
            ValueError: if settings and data do not fit together.
        """
        rows = Rows(settings.data)
        tokenizer = Tokenizer.load(settings.data)
        rows_at_once, accumulate = _batch(settings, rows.row_tokens)
        settings.optim.rates(settings.steps)  # raises what does not fit
        torch.manual_seed(settings.seed)
        config = _config(settings, tokenizer, rows.row_tokens)
        model = MPT(config).to(_device(settings.device))
        model.recompute = settings.recompute
        made_with = {
            "tokenizer": tokenizer.sha256,
            "data": hashlib.sha256(json.dumps(rows.about, sort_keys=True).encode()).hexdigest(),
            "batch_tokens": settings.batch_tokens,
            "seed": settings.seed,
            "optim.name": settings.optim.name,
        }
        return cls(
            rows=rows,
            tokenizer=tokenizer,
            heldout=load_heldout(settings.data),
            model=model,
            optimizer=make_optimizer(model, settings.optim),
            guard=Guard(settings.guard),
            rows_at_once=rows_at_once,
            accumulate=accumulate,
            made_with=made_with,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def end_of_document(self) -> int | None:
        """The token that ends one, where attention keeps documents apart."""
        apart = self.model.config.attn_config.attn_uses_sequence_id
        return self.tokenizer.end_of_text if apart else None

    def snapshot(self, step: int) -> Snapshot:
        """The run after a step, to be written."""
        return Snapshot.take(
            step,
            self.model,
            self.optimizer,
            self.tokenizer,
            guard=self.guard.state_dict(),
            made_with=self.made_with,
        )

    def restore(self, out: Path) -> tuple[int, list[tuple[Path, str]]]:
        """Go on where the newest good checkpoint ends.

        Damaged ones that are newer get another name, `damaged-step-...`.

        Returns:
            The steps taken, 0 if there is no checkpoint; and the damaged ones with what is
            wrong with each.

        Raises:
            ValueError: if no checkpoint is good, or the good one does not fit.
        """
        damaged = []
        for path in reversed(checkpoints(out)):
            what = damage(path)
            if not what:
                break
            damaged.append((path, what))
        else:
            if damaged:
                every = "; ".join(f"{path.name}: {what}" for path, what in damaged)
                raise ValueError(
                    f"{out} has no checkpoint that is whole ({every}); start again with another "
                    "--out"
                )
            remove_partial(out)
            return 0, []
        state = load_checkpoint(path, self.model, self.optimizer, self.made_with)
        self.guard.load_state_dict(state["guard"])
        for bad, _ in damaged:
            _set_aside(bad)
        remove_partial(out)
        return state["step"], damaged

    def go_back(self, out: Path, at_most: int) -> int:
        """Restore the newest good checkpoint of a step up to `at_most`; its step.

        Without one the oldest good checkpoint serves. Newer ones are removed. The guard keeps
        what it decided since.

        Raises:
            ValueError: if no checkpoint is good.
        """
        good = [path for path in checkpoints(out) if not damage(path)]
        if not good:
            raise ValueError(f"{out} has no checkpoint that is whole; start again with another out")
        early = [path for path in good if step_of(path) <= at_most]
        path = early[-1] if early else good[0]
        state = load_checkpoint(path, self.model, self.optimizer, self.made_with)
        decided = {"refused": 0, "rollbacks": self.guard.rollbacks, "skipped": self.guard.skipped}
        self.guard.load_state_dict(state["guard"] | decided)
        for newer in checkpoints(out):
            if step_of(newer) > state["step"]:
                shutil.rmtree(newer)
        return state["step"]


def claim(out: Path, resume: bool) -> None:
    """Make the run directory, or see that it may be gone on with.

    Raises:
        FileExistsError: if it holds a run and `resume` is not set, or holds something else.
    """
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    names -= {LOCK, PARTIAL}  # all that a run killed at its very start leaves
    started = "run.toml" in names
    if names and not (started and resume):
        way_out = "go on with --resume" if started else "it is not a run"
        raise FileExistsError(f"{out} is not empty; {way_out}, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a run directory; a killed one does not.

    Raises:
        FileExistsError: if another process is writing to it.
    """
    lock = filelock.FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise FileExistsError(
            f"another process is writing to {out}; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_settings(out: Path, settings: "Pretrain") -> None:
    """`run.toml`: with it `mptbook pretrain --config` repeats the run."""
    how = {"resume", "supervise", "restarts", "silence"}
    text = tomli_w.dumps(settings.model_dump(mode="json", exclude=how, exclude_none=True))
    partial = out / PARTIAL
    partial.write_text(text)
    partial.replace(out / "run.toml")


def _set_aside(path: Path) -> None:
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)


def _batch(settings: "Pretrain", row_tokens: int) -> tuple[int, int]:
    """Rows at once, and how often they accumulate to a batch."""
    at_once = settings.micro_batch_tokens or settings.batch_tokens
    if at_once % row_tokens:
        name = "micro_batch_tokens" if settings.micro_batch_tokens else "batch_tokens"
        below = max(row_tokens, at_once - at_once % row_tokens)
        raise ValueError(
            f"{name}={at_once} is not a multiple of the {row_tokens} tokens of a row; take {below}"
        )
    if settings.batch_tokens % at_once:
        raise ValueError(
            f"batch_tokens={settings.batch_tokens} is not a multiple of "
            f"micro_batch_tokens={settings.micro_batch_tokens}; "
            f"take {settings.batch_tokens - settings.batch_tokens % at_once}"
        )
    return at_once // row_tokens, settings.batch_tokens // at_once


def _config(settings: "Pretrain", tokenizer: Tokenizer, row_tokens: int) -> MPTConfig:
    shape = {"max_seq_len": row_tokens} | settings.shape
    config = MPTConfig.named(settings.model).replace(**shape)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {settings.data} has {len(tokenizer)} ids, the model only "
            f"{config.vocab_size}; take a larger vocab_size, or prepare with another tokenizer"
        )
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but no CUDA device is here; use --device cpu")
    return torch.device(name)
