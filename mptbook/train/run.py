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

from mptbook.data.curriculum import Curriculum, Stage
from mptbook.data.loader import about_rows
from mptbook.directory import find_directory, load_model
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
from mptbook.train.feed import Feed
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

    feed: Feed
    tokenizer: Tokenizer
    heldout: dict[str, list[str]]
    model: MPT
    optimizer: torch.optim.Optimizer
    guard: Guard
    made_with: dict  # what a resume must find unchanged

    @classmethod
    def make(cls, settings: "Pretrain") -> Self:
        """The parts as they are before the first step.

        Raises:
            ValueError: if settings and data do not fit together.
        """
        about = about_rows(settings.data)
        curriculum = _curriculum(settings, about["row_tokens"])
        feed = Feed(
            settings.data,
            curriculum,
            seed=settings.seed,
            micro_batch_tokens=settings.micro_batch_tokens,
            repeat=settings.repeat,
        )
        tokenizer = Tokenizer.load(settings.data)
        if tokenizer.sha256 != about["tokenizer"]:
            raise ValueError(
                f"{settings.data}/tokenizer.json is not the tokenizer that its rows were made "
                "with; remove the folder and prepare again"
            )
        settings.optim.rates(settings.steps)  # raises what does not fit
        torch.manual_seed(settings.seed)
        longest = max(stage.row_tokens for stage in curriculum.stages)
        model = _model(settings, tokenizer, longest).to(_device(settings.device))
        if feed.packed and not model.config.attn_config.attn_uses_sequence_id:
            raise ValueError(
                f"the rows of {settings.data} hold documents whole, to be kept apart; add "
                "--shape attn_uses_sequence_id=true"
            )
        model.recompute = settings.recompute
        made_with = {
            "tokenizer": tokenizer.sha256,
            "data": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
            "batch_tokens": settings.batch_tokens,
            "stages": _fixed(curriculum),
            "seed": settings.seed,
            "optim.name": settings.optim.name,
        }
        return cls(
            feed=feed,
            tokenizer=tokenizer,
            heldout=load_heldout(settings.data),
            model=model,
            optimizer=make_optimizer(model, settings.optim),
            guard=Guard(settings.guard),
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


def _curriculum(settings: "Pretrain", row_tokens: int) -> Curriculum:
    """The stages of a run; without any, one of all its steps."""
    whole = Stage(
        tokens=settings.steps * settings.batch_tokens,
        row_tokens=row_tokens,
        batch_tokens=settings.batch_tokens,
        mixture=settings.mixture,
    )
    first, *rest = settings.stages or [whole]
    curriculum = Curriculum([whole.model_copy(update=first.model_dump(exclude_none=True)), *rest])
    if curriculum.steps != settings.steps:
        raise ValueError(
            f"the stages have {curriculum.steps:,} steps in all, but steps is "
            f"{settings.steps:,}; make them equal"
        )
    return curriculum


def _fixed(curriculum: Curriculum) -> list[dict]:
    """What a resume must find unchanged: all but how long the last stage is."""
    said = [stage.model_dump(mode="json") for stage in curriculum.stages]
    del said[-1]["tokens"]
    return said


def _model(settings: "Pretrain", tokenizer: Tokenizer, row_tokens: int) -> MPT:
    """With fresh weights, or with those of `settings.weights`."""
    shape = {"max_seq_len": row_tokens} | settings.shape
    if settings.weights is None:
        model = MPT(MPTConfig.named(settings.model).replace(**shape))
    else:
        model = load_model(settings.weights, torch.float32, **shape)
        learned_with = find_directory(settings.weights) / "tokenizer.json"
        if learned_with.exists() and Tokenizer.load(learned_with).sha256 != tokenizer.sha256:
            raise ValueError(
                f"{settings.weights} has another tokenizer than the rows of {settings.data}; "
                f"prepare them with --tokenizer {learned_with}"
            )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {settings.data} has {len(tokenizer)} ids, the model only "
            f"{model.config.vocab_size}; take a larger vocab_size, or prepare with another "
            "tokenizer"
        )
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but no CUDA device is here; use --device cpu")
    return torch.device(name)
