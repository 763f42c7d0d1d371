"""`mptbook bench finetune`: a model before and after it has learned to answer.

mpt-tiny is finetuned by `configs/tiny-instruct.toml`, whole and by adapters, and by
`configs/tiny-chat.toml`. Before and after, it is measured on conversations that were held out:
what their answers cost it, and of its own answers how many end by themselves and how many have the
form that was asked for.
"""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from mptbook.bench.measure import Bench
from mptbook.directory import load_model
from mptbook.finetune.lora import Lora
from mptbook.finetune.measure import answered, response_loss, shares, training_bytes
from mptbook.finetune.sft import Finetune, FinetuneRun, finetune
from mptbook.model.mpt import MPT
from mptbook.settings import CONFIGS
from mptbook.train.course import staged_steps
from mptbook.train.log import read_log
from mptbook.train.recipe import trained

ADAPTERS = Lora(rank=16, alpha=32)
ADAPTERS_LR = 3.0  # times the rate for all weights: an adapter's product is small at first
SHOWN = 3  # answers of each source that are written down


class BenchFinetune(Bench):
    """Finetune mpt-tiny to follow instructions and to chat: `mptbook bench finetune`."""

    home: Path = Field(description="folder for all runs; an interrupted one goes on")
    model: str = Field("", description="what to start from; none: the trained mpt-tiny")
    answers: PositiveInt = Field(32, description="of each source, to look at their form")
    new_tokens: PositiveInt = Field(48, description="of an answer, at most")
    steps: NonNegativeInt = Field(0, description="of each run; 0: as its settings say")

    def compare(self) -> dict:
        """The figures, as JSON has them."""
        found = {}
        for name, settings in self._recipes().items():
            print(f"\n{name}: {settings.out}")
            run = FinetuneRun.make(settings)
            run.model.eval()
            before = self._measure(run, run.model)
            next(iter(staged_steps(run.settings, run, 0)))  # so that all memory is there
            memory = training_bytes(run.model, run.optimizer)
            if not (settings.out / "model").exists():
                finetune(settings)
            after = self._measure(run, load_model(settings.out))
            steps = read_log(settings.out, "step")
            found[name] = {
                "conversations": run.gathered.counts,
                "heldout": {part: len(h.conversations) for part, h in run.heldout.items()},
                "filling": run.gathered.filling,
                "left out": run.gathered.mistakes.counts.total(),
                "overlaps": run.gathered.overlaps.total(),
                "steps": run.settings.steps,
                "batch_tokens": run.settings.batch_tokens,
                "learned tokens": sum(step["targets"] for step in steps),
                "seconds": steps[-1]["seconds"],
                "seed": run.settings.seed,
                "memory": memory,
                "before": before,
                "after": after,
            }
            for when, figures in (("before", before), ("after", after)):
                print(f"{when}: {figures['all']}")
        return {"settings": {"answers": self.answers, "new_tokens": self.new_tokens}, "runs": found}

    def _recipes(self) -> dict[str, Finetune]:
        how = {"model": self.model or str(trained()), "resume": True}
        if self.steps:
            how["steps"] = self.steps
        recipes = {}
        for name in ("instruct", "adapters", "chat"):
            file = CONFIGS / f"tiny-{'chat' if name == 'chat' else 'instruct'}.toml"
            settings = Finetune.from_toml(file, out=self.home / name, **how)
            if name == "adapters":
                settings.lora = ADAPTERS
                settings.optim.lr *= ADAPTERS_LR
            recipes[name] = settings
        return recipes

    def _measure(self, run: FinetuneRun, model: MPT) -> dict:
        """Of each source and of all: the loss of held-out answers, and the form of its own."""
        parts, everything, total = {}, [], None
        for name, heldout in run.heldout.items():
            loss = response_loss(model, heldout, precision=run.settings.precision)
            own = answered(
                model,
                run.tokenizer,
                run.template,
                heldout,
                self.answers,
                max_new_tokens=self.new_tokens,
            )
            parts[name] = {"loss": loss.loss, "tokens": loss.targets, **shares(own)}
            parts[name]["answers"] = [
                {"asked": asked[-200:], "answer": one.text, "ended": one.ended}
                for asked, one in own[:SHOWN]
            ]
            everything += own
            total = loss if total is None else total + loss
        return {"all": {"loss": total.loss, **shares(everything)}, "parts": parts}
