"""Supervised finetuning: a model learns to answer, from conversations: `mptbook finetune`.

A run has the course, the checkpoints and the guard of `mptbook pretrain`. What differs is what it
reads: conversations packed into rows, of which only the answers are learned.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mptbook import world
from mptbook.data.curriculum import Curriculum, Stage
from mptbook.data.instructions import MIXES
from mptbook.data.responses import ResponseRows, apart
from mptbook.directory import find_directory, fresh_directory, load_model, read_config, save_model
from mptbook.eval.perplexity import Prediction
from mptbook.finetune.gather import Gathered, HeldOut, gather
from mptbook.finetune.lora import (
    Lora,
    adapter_weights,
    add_adapters,
    initialise_adapters,
    load_adapters,
    merge,
    write_adapters,
)
from mptbook.finetune.measure import answered, few, response_loss
from mptbook.fsdp import shard
from mptbook.infer.text import check_vocabulary
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.chat import ChatTemplate, LossOn
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.course import Training, train
from mptbook.train.feed import Feed
from mptbook.train.guard import Guard
from mptbook.train.optimizer import make_optimizer
from mptbook.train.run import Run
from mptbook.train.snapshot import consolidate

if TYPE_CHECKING:
    from mptbook.train.log import RunLog


class Finetune(Training):
    """Teach a model to answer, from conversations: `mptbook finetune`."""

    verb: ClassVar[str] = "finetune"

    model: str = Field(description="a run, a model directory, or a hub name, to start from")
    source: dict[str, str] = Field(
        {}, description="name=SOURCE of conversations; without any, the default data `mix`"
    )
    mix: Literal["instructions", "conversations"] = Field(
        "instructions", description="which default data"
    )
    mixture: dict[str, NonNegativeFloat] = Field(
        {}, description="weight of each source; none: all rows alike"
    )
    template: str = Field(
        "chatml", description="instruct, instruct-card, chatml, a Jinja file, or a model directory"
    )
    system: str = Field("", description="a system turn for conversations that have none")
    loss_on: LossOn = Field("last", description="learn the last answer of a conversation, or all")
    row_tokens: NonNegativeInt = Field(0, description="of a row; 0: the model's max_seq_len")
    too_long: Literal["refuse", "cut"] = Field(
        "refuse", description="a conversation longer than a row is a bad row, or loses its end"
    )
    on_bad: Literal["stop", "skip"] = Field(
        "stop", description="at a row that is no conversation: stop, or leave it out, counted"
    )
    keep_evaluation_out: bool = Field(
        True, description="leave out conversations that hold a question of an evaluation set"
    )
    hold_out: bool = Field(True, description="measure on one conversation in fifty")
    epochs: PositiveFloat = Field(2.0, description="times that all conversations are read")
    steps: NonNegativeInt = Field(0, description="optimizer steps; 0: those that epochs take")
    batch_tokens: PositiveInt = Field(65_536, description="tokens per step, filling included")
    lora: Lora = Lora()
    heldout_every: PositiveInt = Field(100, description="steps between held-out measures")
    heldout_rows: PositiveInt = Field(
        16, description="of each source for these; once more on all of them at the end"
    )
    save_every: PositiveInt = Field(500, description="steps between checkpoints")

    def train(self) -> Path:
        return finetune(self)


def finetune(settings: Finetune) -> Path:
    """Finetune, log and save; the path of the model directory, see `mptbook.train.course.train`.

    With `lora.rank` the adapters are in `out/adapter` as peft reads them, and `out/model` has
    them merged.

    Raises:
        ValueError: if settings, data, template and model do not fit together.
    """
    run = FinetuneRun.make(settings)
    return train(run.settings, run)


class ConversationFeed(Feed):
    """As `Feed`, of conversations that are gathered already."""

    def __init__(self, rows: ResponseRows, curriculum: Curriculum, **how) -> None:
        self._gathered = rows
        super().__init__(rows.folder, curriculum, **how)

    def _open(self, data: Path, row_tokens: int) -> ResponseRows:
        return self._gathered

    def batches(self, number: int, **where) -> Iterator[tuple[Tensor, ...]]:
        """(inputs, targets, conversations), of which only what is learned is a target."""
        where.pop("end_of_text", None)  # a row knows itself where conversations begin
        for inputs, targets in super().batches(number, **where):
            yield apart(inputs, targets)


@dataclass
class FinetuneRun(Run):
    """The parts of a run of `mptbook finetune`."""

    template: ChatTemplate
    gathered: Gathered
    heldout: dict[str, HeldOut]

    @classmethod
    def make(cls, settings: Finetune) -> Self:
        """The parts as they are before the first step.

        Raises:
            ValueError: if settings, data, template and model do not fit together.
        """
        folder = world.from_first(lambda: find_directory(settings.model))
        config, tokenizer = read_config(folder), Tokenizer.load(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        template = ChatTemplate.load(settings.template)
        row_tokens = settings.row_tokens or config.max_seq_len
        if config.has_positions and row_tokens > config.max_seq_len:
            raise ValueError(
                f"row_tokens={row_tokens}, but the learned positions of {settings.model} end at "
                f"{config.max_seq_len}; take fewer"
            )
        config = config.replace(max_seq_len=max(row_tokens, config.max_seq_len))
        gathered = world.from_first(lambda: gather(settings, template, tokenizer, row_tokens))
        rows = gathered.response_rows
        settings = _with_steps(settings, len(rows), row_tokens)
        stage = Stage(
            tokens=settings.steps * settings.batch_tokens,
            row_tokens=row_tokens,
            batch_tokens=settings.batch_tokens,
            mixture=settings.mixture,
        )
        feed = ConversationFeed(
            rows,
            Curriculum([stage]),
            seed=settings.seed,
            micro_batch_tokens=settings.micro_batch_tokens,
        )
        feed.check(0, settings.end)
        settings.optim.rates(settings.steps)  # raises what does not fit
        torch.manual_seed(settings.seed)
        model = _model(settings, config, folder)
        torch.manual_seed(settings.seed + world.rank())  # dropout differs between processes
        digest = hashlib.sha256(f"{rows.domains}".encode())
        for name in rows.domains:
            digest.update(gathered.rows[name].tobytes())
        return cls(
            settings=settings,
            feed=feed,
            tokenizer=tokenizer,
            heldout=gathered.heldout,
            model=model,
            optimizer=make_optimizer(model, settings.optim),
            guard=Guard(settings.guard),
            made_with={
                "tokenizer": tokenizer.sha256,
                "data": digest.hexdigest(),
                "batch_tokens": settings.batch_tokens,
                "mixture": settings.mixture,
                "seed": settings.seed,
                "optim.name": settings.optim.name,
                "lora": settings.lora.model_dump(mode="json"),
            },
            template=template,
            gathered=gathered,
        )

    def begin(self, log: "RunLog") -> None:
        """Log what was gathered, and what was left out and why."""
        log.event("gathered", 0, **self.gathered.as_json())
        for line in self.gathered.lines():
            log.say(line)
        for name in () if self.settings.source else self.gathered.counts:
            part = MIXES[self.settings.mix][name]
            log.say(f"{name}: {part.source}. Licence: {part.licence}")

    def look(self, log: "RunLog", step: int) -> None:
        """What is measured between steps: some held-out answers, and one of the model's own."""
        if self.heldout:
            self._measure(log, "heldout", step, few(self.heldout, self.settings.heldout_rows))
            of_source = next(iter(self.heldout.values()))
            for asked, own in answered(self.model, self.tokenizer, self.template, of_source, 1):
                log.sample(step, asked, own.text)

    def look_at_all(self, log: "RunLog", step: int) -> None:
        """What is measured at the end: all held-out answers."""
        if self.heldout:
            self._measure(log, "final", step, self.heldout)

    def _measure(self, log: "RunLog", kind: str, step: int, heldout: dict[str, HeldOut]) -> None:
        found = {
            name: response_loss(self.model, part, precision=self.settings.precision)
            for name, part in heldout.items()
        }
        total = sum(found.values(), start=Prediction(0.0, 0, 0))
        domains = {name: prediction.bits_per_byte for name, prediction in found.items()}
        log.heldout(kind, step, total.bits_per_byte, domains)

    def finish(self, out: Path, last: Path) -> None:
        """Make `out/model` with the template in it, and of adapters `out/adapter`."""
        if not self.settings.lora.rank:
            world.from_first(lambda: consolidate(last, out / "model", template=self.template))
            return
        weights = adapter_weights(self.model)
        world.from_first(lambda: self._finish_adapters(out, weights))

    def _finish_adapters(self, out: Path, weights: dict[str, Tensor]) -> None:
        folder = out / "adapter"
        shutil.rmtree(folder, ignore_errors=True)  # of this run, when it ended before
        with fresh_directory(folder) as fresh:
            write_adapters(self.model, weights, fresh, self.settings.model, self.template)
        longest = self.model.config.max_seq_len
        model = load_model(self.settings.model, torch.float32, max_seq_len=longest)
        load_adapters(model, folder)
        merge(model)
        save_model(model, out / "model", self.tokenizer, template=self.template)


def _with_steps(settings: Finetune, n_rows: int, row_tokens: int) -> Finetune:
    """The settings with the number of steps that the epochs take, where none is given."""
    if settings.steps:
        return settings
    batch_rows = max(1, settings.batch_tokens // row_tokens)
    steps = math.ceil(settings.epochs * n_rows / batch_rows)
    return settings.model_copy(update={"steps": steps})


def _model(settings: Finetune, config: MPTConfig, folder: Path) -> MPT:
    """On its device with its adapters, if it has any; split, among several processes."""
    device = world.device(settings.device)
    lora = settings.lora

    def adapt(model: MPT) -> None:
        if lora.rank:
            add_adapters(model, lora)

    if world.size() > 1:
        model = shard(
            config,
            settings.fsdp,
            device,
            weights=folder,
            recompute=settings.recompute,
            precision=settings.precision,
            adapt=adapt,
        )
    else:
        model = load_model(folder, torch.float32, device, max_seq_len=config.max_seq_len)
        model.recompute = settings.recompute
        adapt(model)
    if lora.rank:
        initialise_adapters(model, settings.seed)
    return model
