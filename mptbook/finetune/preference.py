"""`mptbook prefer`: a model that has learned which answers people like, by trl's DPOTrainer.

The run directory: run.toml, log.jsonl, trainer/checkpoint-N as transformers writes them, and at
the end the model directory model/.
"""

import math
import random
import tomllib
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from mptbook import world
from mptbook.data.conversations import Mistakes
from mptbook.data.preferences import LICENCE, SOURCE, Pair, default_pairs, read_pairs
from mptbook.directory import find_directory, load_model, save_model
from mptbook.finetune.dpo import EncodedPair, encode_pairs, margins, pair_log_probs
from mptbook.finetune.lora import Lora, add_adapters, initialise_adapters, merge
from mptbook.infer.text import check_vocabulary
from mptbook.model.precision import Precision
from mptbook.settings import RunSettings
from mptbook.tokenizer.chat import ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.rundir import claim, locked, write_settings

# What may change when a run goes on.
FREE = ("out", "resume", "save_every", "device", "precision")


class Preference(RunSettings):
    """Learn from answers that were liked better than others: `mptbook prefer --model DIR`."""

    model: str = Field(description="a chat model: its directory, a run, or a name on the hub")
    out: Path = Field(description="directory of the run")
    source: str = Field(
        "", description="pairs: .jsonl, .parquet, or hf:NAME; without, the default set"
    )
    matched: bool = Field(True, description="of the default set, pair answers of like length")
    on_bad: Literal["stop", "skip"] = Field("stop", description="what to do at a row with no pair")
    heldout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="part of the prompts of --source to measure on; 0: measure on no pairs",
    )
    template: str = Field("", description="of prompts; without, the model's own")
    max_tokens: PositiveInt | None = Field(
        None, description="of a prompt with an answer (default: the model's row)"
    )
    beta: PositiveFloat = Field(0.1, description="reward of a nat away from the start")
    lr: float = Field(1e-5, gt=0, allow_inf_nan=False, description="peak learning rate of AdamW")
    warmup: float = Field(0.1, ge=0, lt=1, description="part of the steps; then it falls to 0")
    weight_decay: NonNegativeFloat = Field(0.0, description="of matrices, times lr, per step")
    epochs: PositiveFloat = Field(1.0, description="passes over the pairs")
    steps: NonNegativeInt = Field(0, description="optimizer steps; 0: those that epochs take")
    batch_pairs: PositiveInt = Field(16, description="pairs per step")
    micro_pairs: PositiveInt = Field(4, description="pairs at a time; must divide batch_pairs")
    clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    lora: Lora = Lora()
    save_every: PositiveInt = Field(500, description="steps between checkpoints")
    seed: int = Field(0, description="of the order of the pairs")
    resume: bool = Field(False, description="go on after the newest checkpoint in --out")
    precision: Precision = Field("auto", description="auto: bf16 where the device has units for it")
    device: str = Field("auto", description="cpu, cuda, or auto")

    def run(self) -> None:
        prefer(self)


@dataclass(frozen=True)
class Liking:
    """How well a model's implicit rewards agree with people.

    Attributes:
        accuracy: part of the pairs whose chosen answer has the higher reward.
        error: standard error of it, as if the pairs were independent.
        margin: mean difference of the rewards over beta, in nats.
        chosen, rejected: mean change of log-probability, in nats.
        pairs: how many.
    """

    accuracy: float
    error: float
    margin: float
    chosen: float
    rejected: float
    pairs: int

    @classmethod
    def of(cls, policy: Tensor, reference: Tensor) -> "Liking":
        """Of (B, 2) log-probabilities from `pair_log_probs`; a tie counts half."""
        margin = margins(policy, reference)
        right = (margin > 0).float() + (margin == 0).float() / 2
        accuracy = float(right.mean())
        chosen, rejected = (policy - reference).mean(dim=0).tolist()
        error = math.sqrt(accuracy * (1 - accuracy) / len(margin))
        return cls(accuracy, error, float(margin.mean()), chosen, rejected, len(margin))


def prefer(settings: Preference, quiet: bool = False) -> Path:
    """Finetune a model by direct preference optimization; its model directory.

    The reference is the model as it was: its log-probabilities are computed once, before the
    first step.

    Args:
        quiet: write the log, but show nothing.

    Raises:
        ValueError: if settings, pairs and model do not fit together, or trl is not installed.
        FileExistsError: if `out` holds something else, or is being written by another process.
    """
    from mptbook.finetune.trainer import PairLog, hushed, make_trainer, require_trl

    require_trl()
    _check(settings)
    _check_resume(settings)
    folder = find_directory(settings.model)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(settings.template or folder)
    model = load_model(folder, torch.float32, world.device(settings.device))
    check_vocabulary(tokenizer, model.config.vocab_size)
    train, heldout, lines = _pairs(settings, template, tokenizer, model.config.max_seq_len)
    claim(settings)
    with locked(settings.out), PairLog(settings.out, quiet) as log, hushed():
        write_settings(settings.out, settings)
        keep_freed_memory()
        for line in lines:
            log.say(line)
        score = partial(pair_log_probs, model, precision=settings.precision)
        scored, before = score(train), score(heldout) if heldout else None
        if settings.lora.rank:
            torch.manual_seed(settings.seed)
            add_adapters(model, settings.lora)
            initialise_adapters(model)
        trainer = make_trainer(settings, model, tokenizer, train, scored, log)
        trainer.train(resume_from_checkpoint=_newest(settings.out / "trainer"))
        model.eval()
        if heldout:
            liking = Liking.of(score(heldout), before)
            log.event("heldout", trainer.state.global_step, **vars(liking))
            log.say(
                f"held out: {liking.accuracy:.1%} of {liking.pairs:,} pairs as people have them "
                f"(standard error {liking.error:.1%}), margin {liking.margin:.2f} nats"
            )
        if settings.lora.rank:
            merge(model)
        save_model(model, settings.out / "model", tokenizer, template=template)
        log.say(f"model directory: {settings.out / 'model'}")
    return settings.out / "model"


def _check(settings: Preference) -> None:
    if settings.batch_pairs % settings.micro_pairs:
        raise ValueError(
            f"micro_pairs={settings.micro_pairs} does not divide "
            f"batch_pairs={settings.batch_pairs}; choose one that does"
        )
    if world.launched():
        raise ValueError("mptbook prefer runs in one process; start it without torchrun")


def _check_resume(settings: Preference) -> None:
    """See that a run goes on as it was begun."""
    file = settings.out / "run.toml"
    if not settings.resume or not file.exists():
        return
    begun = tomllib.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.model_dump(mode="json").items():
        if name not in FREE and begun.get(name) != value:
            raise ValueError(
                f"{settings.out} was begun with {name}={begun.get(name)}, not {value}; go on with "
                "the same, or choose another --out"
            )


def _pairs(
    settings: Preference, template: ChatTemplate, tokenizer: Tokenizer, row_tokens: int
) -> tuple[list[EncodedPair], list[EncodedPair], list[str]]:
    """Pairs to learn from, pairs held out, and what there is to say about them."""
    mistakes = Mistakes(settings.on_bad)
    if settings.source:
        pairs = read_pairs(settings.source, mistakes)
        sides = [[p for p in pairs if _unseen(p, settings.heldout) == side] for side in (0, 1)]
    else:
        splits = ("train", "heldout") if settings.heldout else ("train",)
        sides = [default_pairs(split, matched=settings.matched) for split in splits]
    if not sides[0]:
        raise ValueError(f"heldout={settings.heldout} leaves no pair to learn from; lower it")
    most = settings.max_tokens or row_tokens
    train, too_long = encode_pairs(template, tokenizer, sides[0], most, mistakes)
    heldout: list[EncodedPair] = []
    if sides[1:] and sides[1]:
        heldout, more = encode_pairs(template, tokenizer, sides[1], most, mistakes)
        too_long += more
    if len(train) > settings.steps * settings.batch_pairs > 0:  # the others would not be read
        chance = random.Random(settings.seed)
        train = chance.sample(train, settings.steps * settings.batch_pairs)
    lines = [
        f"{len(train):,} pairs to learn from, {len(heldout):,} held out; both are scored first"
    ]
    if not settings.source:
        lines.insert(0, f"default pairs: {SOURCE}. Licence: {LICENCE}")
    if too_long:
        lines.append(f"left out {too_long:,} pairs with more than {most:,} tokens")
    return train, heldout, lines + mistakes.lines()


def _unseen(pair: Pair, part: float) -> bool:
    """By the prompt alone: all pairs of a prompt are on the same side."""
    texts = "\0".join(turn["content"] for turn in pair.prompt)
    return zlib.crc32(texts.encode()) < part * 2**32


def _newest(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(found, key=lambda path: int(path.name.partition("-")[2]))) if found else None
