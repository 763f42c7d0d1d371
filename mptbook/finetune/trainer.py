"""trl's DPOTrainer for an MPT: what it has to be told, and what it says in return.

trl scores answers by the layers below the head and by the head's weight, each called by its name;
`Policy` gives them to it. Pairs come encoded, and with the reference's log-probabilities.
"""

import importlib
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import datasets
import transformers
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.modeling_outputs import BaseModelOutput

from mptbook.finetune.dpo import EncodedPair
from mptbook.hf import MPTForCausalLM
from mptbook.model.mpt import MPT
from mptbook.model.precision import resolved
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from mptbook.finetune.preference import Preference

SECONDS_BETWEEN_LINES = 10  # where the output is not a terminal
# What trl calls the figures of a step, and what the log does.
FIGURES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward_margin",
}


class Policy(MPTForCausalLM):
    """An MPT whose layers below the head, and head, trl can call by name."""

    @property
    def base_model(self) -> Any:
        return self._below_the_head

    def _below_the_head(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        # Without the mask: trl pads at the end, where a causal model does not look.
        return BaseModelOutput(last_hidden_state=self.mpt.hidden(input_ids))

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.mpt.head, bias=None)


def require_trl() -> None:
    """See that trl is installed.

    Raises:
        ValueError: if it is not, saying how to get it.
    """
    try:
        importlib.import_module("trl")
    except ImportError:
        raise ValueError(
            "preferences are learned with trl, which is not here; pip install 'mptbook[finetune]'"
        ) from None


def make_trainer(
    settings: "Preference",
    model: MPT,
    tokenizer: Tokenizer,
    pairs: Sequence[EncodedPair],
    reference: Tensor,
    log: "PairLog",
):
    """The trainer of a run; it changes `model` in place.

    Args:
        reference: (B, 2) from `mptbook.finetune.dpo.pair_log_probs`.
    """
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        """Takes pairs that are encoded, and scored by the reference, already."""

        def _prepare_dataset(self, dataset, *_: Any):
            return dataset

        def _precompute_ref_logps(self, dataset, *_: Any):
            return dataset

    policy = Policy.of(model)
    policy.config.logit_scale = model.config.logit_factor  # trl multiplies by it: a number
    chosen, rejected = reference.T.tolist()
    rows = datasets.Dataset.from_dict(
        {
            "prompt_ids": [pair.prompt for pair in pairs],
            "chosen_ids": [pair.chosen for pair in pairs],
            "rejected_ids": [pair.rejected for pair in pairs],
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
    )
    steps = steps_of(settings, len(pairs))
    on_gpu = model.device.type == "cuda"
    config = DPOConfig(
        output_dir=str(settings.out / "trainer"),
        beta=settings.beta,
        max_steps=steps,
        per_device_train_batch_size=settings.micro_pairs,
        gradient_accumulation_steps=settings.batch_pairs // settings.micro_pairs,
        learning_rate=settings.lr,
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        precompute_ref_log_probs=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=resolved(model.device, settings.precision) == "bf16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
        data_seed=settings.seed,
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    trainer = Trainer(
        policy, args=config, train_dataset=rows, processing_class=fast, callbacks=[Steps(log)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def steps_of(settings: "Preference", pairs: int) -> int:
    """Steps of a run over so many pairs."""
    return settings.steps or math.ceil(settings.epochs * pairs / settings.batch_pairs)


class PairLog:
    """Writes `log.jsonl`, and shows progress: a bar on a terminal, else a line now and then.

    A `step` line has loss (nats per pair), grad_norm, lr, accuracy and reward_margin of the
    step's pairs; a `heldout` line what `mptbook.finetune.preference.Liking` has.

    Args:
        run: the run directory.
        quiet: write, but show nothing.
    """

    def __init__(self, run: Path, quiet: bool = False) -> None:
        self._file = (run / "log.jsonl").open("a", buffering=1, encoding="utf-8")
        self._quiet, self._terminal = quiet, sys.stdout.isatty() and not quiet
        self._last_line = time.monotonic()
        self._bar = Progress(
            BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), transient=True
        )
        self._task = self._bar.add_task("", total=None)

    def event(self, kind: str, step: int, **what: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **what}) + "\n")

    def step(self, step: int, steps: int, figures: dict[str, float]) -> None:
        self.event("step", step, **figures)
        line = f"step {step:,} of {steps:,}  " + "  ".join(
            f"{name} {figures[name]:.3f}" for name in ("loss", "accuracy", "reward_margin")
        )
        if self._terminal:
            self._bar.update(self._task, total=steps, completed=step, description=line)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self.say(line)
            self._last_line = time.monotonic()

    def say(self, line: str) -> None:
        if self._terminal:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self._quiet:
            print(line, flush=True)

    def __enter__(self) -> Self:
        if self._terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._terminal:
            self._bar.stop()
        self._file.close()


class Steps(TrainerCallback):
    """Hands the figures of each step to the log, and ends a run that has lost its course."""

    def __init__(self, log: PairLog) -> None:
        self._log = log

    def on_log(self, args, state, control, logs=None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return  # the totals after the last step
        figures = {ours: float(logs[theirs]) for theirs, ours in FIGURES.items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(figures[name]):
                raise ValueError(
                    f"step {state.global_step:,}: {name} is {figures[name]}; "
                    f"lower lr={args.learning_rate:g}"
                )
        self._log.step(state.global_step, state.max_steps, figures)


@contextmanager
def hushed() -> Iterator[None]:
    """Without what transformers and trl have to say to developers, and bars of their own."""
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate")]
    levels = [logger.level for logger in loggers]
    bars = transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
