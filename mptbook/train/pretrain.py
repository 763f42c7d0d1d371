"""A whole pretraining run, from prepared rows to a model directory: `mptbook pretrain`."""

import signal
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import datasets
import tomli_w
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from mptbook.data.loader import Rows, batches
from mptbook.directory import save_model
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.infer.generate import generate
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.groups import decay_groups
from mptbook.optim.lion import Lion
from mptbook.optim.schedule import schedule
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from mptbook.train.log import RunLog
from mptbook.train.loop import train_steps


class Optim(BaseModel):
    """The optimizer and its learning rate."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["lion", "adamw"] = "lion"
    lr: PositiveFloat = Field(1e-4, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="decay of the momentum(s)")
    weight_decay: float = Field(0.1, ge=0, description="of matrices, times lr, per step")
    schedule: Literal["cosine", "linear", "inverse_sqrt", "trapezoid"] = "cosine"
    warmup: NonNegativeInt = Field(100, description="steps of linear rise")
    floor: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    decay: float = Field(0.4, gt=0, le=1, description="part of a trapezoid that falls")
    clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")

    def rates(self, steps: int) -> Callable[[int], float]:
        """The learning rate as a function of the step, for a run of so many."""
        return schedule(
            self.schedule,
            self.lr,
            steps=steps,
            warmup=self.warmup,
            floor=self.floor,
            decay=self.decay,
        )


class Pretrain(RunSettings):
    """Train a model from scratch: `mptbook pretrain`."""

    out: Path = Field(description="run directory to write")
    data: Path = Field(description="folder that mptbook prepare wrote")
    model: str = Field("mpt-tiny", description="a named size; its vocabulary must fit the data")
    shape: dict[str, bool | int | float | str] = Field(
        {}, description="fields of MPTConfig that differ, e.g. --shape n_layers=2"
    )
    steps: PositiveInt = Field(4800, description="optimizer steps")
    batch_tokens: PositiveInt = Field(524_288, description="tokens per step")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="tokens at once; fewer than batch_tokens accumulate (default: all)"
    )
    optim: Optim = Optim()
    seed: int = Field(17, description="of the initial weights and the order of the data")
    precision: Literal["bf16", "fp32"] = "bf16"
    recompute: bool = Field(False, description="recompute activations to save memory")
    device: str = Field("auto", description="cpu, cuda, or auto")
    heldout_every: PositiveInt = Field(1000, description="steps between held-out measures")
    heldout_characters: PositiveInt = Field(
        65_536, description="of each domain for these; once more on all of it at the end"
    )
    sample_prompt: str = Field("The", description="continued whenever held out is measured")
    save_every: PositiveInt = Field(1000, description="steps between checkpoints")
    keep: PositiveInt = Field(2, description="checkpoints kept")
    resume: bool = Field(False, description="go on from the newest checkpoint in --out")

    @field_validator("shape")
    @classmethod
    def _typed(cls, shape: dict) -> dict:
        return {key: _value(text) if isinstance(text, str) else text for key, text in shape.items()}

    def run(self) -> None:
        pretrain(self)


def _value(text: str) -> bool | int | float | str:
    """What a flag's text means in TOML: a number, true or false; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def pretrain(run: Pretrain) -> Path:
    """Train, log and save; the path of the finished model directory, `out/model`.

    Ctrl-C ends the run after the step it is in, with a checkpoint.

    Raises:
        ValueError: if settings and data do not fit together.
        FileExistsError: if `out` holds a run and `resume` is not set.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
    """
    rows = Rows(run.data)
    tokenizer = Tokenizer.load(run.data)
    heldout = _heldout(run.data)
    rows_at_once, accumulate = _batch(run, rows.row_tokens)
    rates = run.optim.rates(run.steps)
    torch.manual_seed(run.seed)
    model = MPT(_config(run, tokenizer, rows.row_tokens)).to(_device(run.device))
    model.recompute = run.recompute
    optimizer = make_optimizer(model, run.optim)
    start = _open(run, model, optimizer)
    apart = model.config.attn_config.attn_uses_sequence_id
    stream = batches(
        rows,
        rows_at_once,
        seed=run.seed,
        start=start * accumulate,
        end_of_text=tokenizer.end_of_text if apart else None,
    )
    training = train_steps(
        model,
        stream,
        optimizer,
        rates,
        steps=run.steps,
        start=start,
        accumulate=accumulate,
        clip=run.optim.clip,
        precision=run.precision,
    )
    keep_freed_memory()
    with RunLog(run.out, run.steps, start) as log, _stop_after_step() as stop:
        for taken in training:
            log.step(taken)
            step, last = taken.step, taken.step == run.steps
            if step % run.heldout_every == 0 or last:
                _look(run, log, step, model, tokenizer, heldout)
            if step % run.save_every == 0 or last or stop.is_set():
                path = save_checkpoint(run.out, step, model, optimizer, tokenizer, run.keep)
                log.event("saved", step, path=path.name)
            if stop.is_set() and not last:
                log.say(f"stopped, saved {path}; go on with the same command and --resume")
                raise KeyboardInterrupt
        _measure(run, log, "final", run.steps, model, tokenizer, heldout)
        save_model(model, run.out / "model", tokenizer)
        log.say(f"model directory: {run.out / 'model'}")
    return run.out / "model"


def make_optimizer(model: MPT, optim: Optim) -> torch.optim.Optimizer:
    """Lion or AdamW over the model's weights; only matrices decay."""
    groups = decay_groups(model, optim.weight_decay)
    if optim.name == "lion":
        return Lion(groups, lr=optim.lr, betas=optim.betas)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)


def _batch(run: Pretrain, row_tokens: int) -> tuple[int, int]:
    """Rows at once, and how often they accumulate to a batch."""
    at_once = run.micro_batch_tokens or run.batch_tokens
    if at_once % row_tokens:
        name = "micro_batch_tokens" if run.micro_batch_tokens else "batch_tokens"
        below = max(row_tokens, at_once - at_once % row_tokens)
        raise ValueError(
            f"{name}={at_once} is not a multiple of the {row_tokens} tokens of a row; take {below}"
        )
    if run.batch_tokens % at_once:
        raise ValueError(
            f"batch_tokens={run.batch_tokens} is not a multiple of "
            f"micro_batch_tokens={run.micro_batch_tokens}; "
            f"take {run.batch_tokens - run.batch_tokens % at_once}"
        )
    return at_once // row_tokens, run.batch_tokens // at_once


def _config(run: Pretrain, tokenizer: Tokenizer, row_tokens: int) -> MPTConfig:
    config = MPTConfig.named(run.model).replace(**({"max_seq_len": row_tokens} | run.shape))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {run.data} has {len(tokenizer)} ids, the model only "
            f"{config.vocab_size}; take a larger vocab_size, or prepare with another tokenizer"
        )
    return config


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name}, but no CUDA device is here; use --device cpu")
    return torch.device(name)


def _open(run: Pretrain, model: MPT, optimizer: torch.optim.Optimizer) -> int:
    """Make the run directory, or restore what it holds; the steps taken."""
    started = (run.out / "run.toml").exists()
    taken = run.out.exists() and any(run.out.iterdir())
    if taken and not (started and run.resume):
        way_out = "go on with --resume" if started else "it is not a run"
        raise FileExistsError(f"{run.out} is not empty; {way_out}, or choose another --out")
    found = checkpoints(run.out) if taken else []
    start = load_checkpoint(found[-1], model, optimizer) if found else 0
    run.out.mkdir(parents=True, exist_ok=True)
    settings = run.model_dump(mode="json", exclude={"resume"}, exclude_none=True)
    (run.out / "run.toml").write_text(tomli_w.dumps(settings))
    return start


def _heldout(data: Path) -> dict[str, list[str]]:
    """The held-out texts of each domain."""
    files = sorted((data / "heldout").glob("*.arrow"))
    return {file.stem: datasets.Dataset.from_file(str(file))["text"][:] for file in files}


def _look(run, log, step, model, tokenizer, heldout: dict[str, list[str]]) -> None:
    """Log the bits per byte of the front of each domain, and a sample."""
    some = {name: _first(texts, run.heldout_characters) for name, texts in heldout.items()}
    _measure(run, log, "heldout", step, model, tokenizer, some)
    prompt = run.sample_prompt
    text = generate(model, tokenizer, prompt, max_new_tokens=48, temperature=0.8)[0]
    log.sample(step, prompt, text)


def _measure(run, log, kind, step, model, tokenizer, heldout: dict[str, list[str]]) -> None:
    """Log the bits per byte of each domain and of all together."""
    found = {
        name: perplexity(model, tokenizer, texts, precision=run.precision)
        for name, texts in heldout.items()
    }
    total = sum(found.values(), start=Prediction(0.0, 0, 0))
    domains = {name: prediction.bits_per_byte for name, prediction in found.items()}
    log.heldout(kind, step, total.bits_per_byte, domains)


def _first(texts: list[str], n_characters: int) -> list[str]:
    """Texts from the front, the last one cut, with so many characters in all."""
    kept = []
    for text in texts:
        kept.append(text[:n_characters])
        n_characters -= len(kept[-1])
        if n_characters <= 0:
            break
    return kept


@contextmanager
def _stop_after_step() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return

    def on_interrupt(number, frame):
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
