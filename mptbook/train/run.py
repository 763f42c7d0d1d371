"""What a run consists of."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from mptbook import world
from mptbook.data.curriculum import Curriculum, Stage
from mptbook.data.loader import about_rows
from mptbook.directory import check_values, find_directory, load_model, read_config
from mptbook.fsdp import shard
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.checkpoint import (
    checkpoints,
    good_before,
    newest_good,
    remove_after,
    step_of,
    tidy,
)
from mptbook.train.feed import Feed
from mptbook.train.guard import Guard
from mptbook.train.heldout import front, load_heldout, measure, sample
from mptbook.train.optimizer import make_optimizer
from mptbook.train.snapshot import Snapshot, consolidate, load_snapshot

if TYPE_CHECKING:
    from mptbook.train.course import Training
    from mptbook.train.log import RunLog
    from mptbook.train.pretrain import Pretrain


@dataclass
class Run:
    """The parts of a run, of `mptbook pretrain` where nothing else is said."""

    settings: "Training"
    feed: Feed
    tokenizer: Tokenizer
    heldout: dict
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
        feed.check(_steps_taken(settings), settings.end)
        tokenizer = Tokenizer.load(settings.data)
        if tokenizer.sha256 != about["tokenizer"]:
            raise ValueError(
                f"{settings.data}/tokenizer.json is not the tokenizer that its rows were made "
                "with; remove the folder and prepare again"
            )
        settings.optim.rates(settings.steps)  # raises what does not fit
        torch.manual_seed(settings.seed)
        longest = max(stage.row_tokens for stage in curriculum.stages)
        model = _model(settings, tokenizer, longest)
        if world.rank():  # what is left to chance is chance for each: rows are others, too
            torch.manual_seed(settings.seed + world.rank())
        if feed.packed and not model.config.attn_config.attn_uses_sequence_id:
            raise ValueError(
                f"the rows of {settings.data} hold documents whole, to be kept apart; add "
                "--shape attn_uses_sequence_id=true"
            )
        made_with = {
            "tokenizer": tokenizer.sha256,
            "data": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
            "batch_tokens": settings.batch_tokens,
            "stages": _fixed(curriculum),
            "seed": settings.seed,
            "optim.name": settings.optim.name,
        }
        return cls(
            settings=settings,
            feed=feed,
            tokenizer=tokenizer,
            heldout=load_heldout(settings.data),
            model=model,
            optimizer=make_optimizer(model, settings.optim),
            guard=Guard(settings.guard),
            made_with=made_with,
        )

    @property
    def end_of_document(self) -> int | None:
        """The token that ends one, where attention keeps documents apart."""
        apart = self.model.config.attn_config.attn_uses_sequence_id
        return self.tokenizer.end_of_text if apart else None

    def begin(self, log: "RunLog") -> None:
        """What there is to say before the first step."""

    def look(self, log: "RunLog", step: int) -> None:
        """What is measured between steps: the front of the held-out texts, and a sample."""
        settings: Pretrain = self.settings
        texts = front(self.heldout, settings.heldout_characters)
        measure(log, "heldout", step, self.model, self.tokenizer, texts, settings.precision)
        sample(log, step, self.model, self.tokenizer, settings.sample_prompt)

    def look_at_all(self, log: "RunLog", step: int) -> None:
        """What is measured at the end: all held-out texts."""
        rest = self.model, self.tokenizer, self.heldout, self.settings.precision
        measure(log, "final", step, *rest)

    def finish(self, out: Path, last: Path) -> None:
        """Make `out/model` of the last checkpoint."""
        world.from_first(lambda: consolidate(last, out / "model"))

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
        path, damaged = world.from_first(lambda: newest_good(out))
        step = 0
        if path is not None:
            state = load_snapshot(path, self.model, self.optimizer, self.made_with)
            self.guard.load_state_dict(state["guard"])
            step = state["step"]
        world.from_first(lambda: tidy(out, damaged))
        return step, damaged

    def go_back(self, out: Path, at_most: int) -> int:
        """Restore the newest good checkpoint of a step up to `at_most`; its step.

        Without one the oldest good checkpoint serves. Newer ones are removed. The guard keeps
        what it decided since.

        Raises:
            ValueError: if no checkpoint is good.
        """
        path = world.from_first(lambda: good_before(out, at_most))
        state = load_snapshot(path, self.model, self.optimizer, self.made_with)
        decided = {"refused": 0, "rollbacks": self.guard.rollbacks, "skipped": self.guard.skipped}
        self.guard.load_state_dict(state["guard"] | decided)
        world.from_first(lambda: remove_after(out, state["step"]))
        return state["step"]


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


def _steps_taken(settings: "Pretrain") -> int:
    """The step that a resume will most likely go on from."""
    found = settings.resume and settings.out.exists() and checkpoints(settings.out)
    return step_of(found[-1]) if found else 0


def _fixed(curriculum: Curriculum) -> list[dict]:
    """What a resume must find unchanged: all but how long the last stage is."""
    said = [stage.model_dump(mode="json") for stage in curriculum.stages]
    del said[-1]["tokens"]
    return said


def _model(settings: "Pretrain", tokenizer: Tokenizer, row_tokens: int) -> MPT:
    """On its device, with fresh weights or those of `settings.weights`; split, among several."""
    device = world.device(settings.device)
    changes = {"max_seq_len": row_tokens} | settings.shape
    if settings.weights is None:
        config = MPTConfig.named(settings.model).replace(**changes)
    else:
        config = _config_of_weights(settings, tokenizer).replace(**changes)
    check_values(config)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {settings.data} has {len(tokenizer)} ids, the model only "
            f"{config.vocab_size}; take a larger vocab_size, or prepare with another tokenizer"
        )
    if world.size() > 1:
        return shard(
            config,
            settings.fsdp,
            device,
            weights=settings.weights,
            recompute=settings.recompute,
            precision=settings.precision,
        )
    if settings.weights is None:
        model = MPT(config).to(device)
    else:
        model = load_model(settings.weights, torch.float32, device, **changes)
    model.recompute = settings.recompute
    return model


def _config_of_weights(settings: "Pretrain", tokenizer: Tokenizer) -> MPTConfig:
    """Of a model that was trained with the tokenizer of the rows."""
    folder = find_directory(settings.weights)
    learned_with = folder / "tokenizer.json"
    if learned_with.exists() and Tokenizer.load(learned_with).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{settings.weights} has another tokenizer than the rows of {settings.data}; "
            f"prepare them with --tokenizer {learned_with}"
        )
    return read_config(folder)
