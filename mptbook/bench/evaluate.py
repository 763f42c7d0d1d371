"""`mptbook bench evaluate`: three models on the default suite, and what sharing prompts is worth.

mpt-tiny stands beside the same shape with the weights that it began with, which knows nothing, and
beside SmolLM2-135M-Instruct. Every choice is scored by all conventions at once.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field, PositiveInt

from mptbook.bench.measure import Bench, medians
from mptbook.data.benchmarks import load_benchmark
from mptbook.eval.peer import SMOLLM2, peer_path
from mptbook.eval.reader import Reader, load_reader
from mptbook.eval.score import likelihoods
from mptbook.eval.suite import calibration_error, categories, confidence, load_suite, run_task
from mptbook.eval.tasks import Choice, Task, pose
from mptbook.hf import MPTForCausalLM
from mptbook.model.mpt import MPT
from mptbook.train.recipe import trained

TINY, UNTRAINED = "mpt-tiny", "mpt-tiny, untrained"
LEFT_OUT = ("humaneval",)  # of the suite: models of this size pass nothing of it
MOST_TOKENS = 2048  # for all models: ALiBi lets mpt-tiny read what is longer than its rows


def untrained(reader: Reader, seed: int = 0) -> Reader:
    """The same shape and tokenizer with the weights that a training begins with."""
    torch.manual_seed(seed)
    model = MPTForCausalLM.of(MPT(reader.model.mpt.config).eval())
    return Reader(model, reader.tokenizer, reader.precision, reader.max_tokens)


def compare(
    readers: Mapping[str, Reader],
    tasks: Mapping[str, Task],
    *,
    items: int = 150,
    repeats: int = 3,
    batch_tokens: int = 4096,
) -> dict:
    """Put tasks to models, and time the reading of what prompts share.

    Args:
        readers: the models by name; the first is the one that is timed.
        tasks: by name.
        items: questions of each task, the same for all models.
        repeats: rounds of the timing.

    Returns:
        ``models``: for each and each task ``n``, ``accuracy``, ``error``, ``chance``, ``above``,
        ``seconds``, and of a choice ``calibration`` of the plain log-likelihoods, ``golds`` and
        ``chosen``, a digit for each question, and ``rights``: by each convention a string of 1
        and 0; and ``sharing``, see `sharing`.
    """
    suite = load_suite("default")
    found: dict[str, dict] = {}
    for name, reader in readers.items():
        found[name] = {}
        for task_name, task in tasks.items():
            began = time.monotonic()
            one = _asked(reader, task, items, batch_tokens)
            one["seconds"] = round(time.monotonic() - began, 1)
            found[name][task_name] = one
            print(
                f"{name:24} {task_name:14} {one['accuracy']:.3f} ± {one['error']:.3f}", flush=True
            )
    return {
        "items": items,
        "max_tokens": MOST_TOKENS,
        "tasks": {name: task.model_dump(mode="json") for name, task in tasks.items()},
        "categories": {name: categories(suite, tasks_of) for name, tasks_of in found.items()},
        "models": found,
        "sharing": sharing(next(iter(readers.values())), repeats=repeats),
    }


def _asked(reader: Reader, task: Task, items: int, batch_tokens: int) -> dict:
    every = isinstance(task, Choice)
    asked = task.model_copy(update={"normalise": "unconditional"}) if every else task
    found = run_task(reader, asked, items=items, batch_tokens=batch_tokens)
    kept = ("n", "chance", "accuracy", "error", "above", "truncated", "subjects")
    one = {key: found[key] for key in kept if key in found}
    if not every:
        return one
    rights = {
        how: "".join(str(int(row["chosen"][how] == row["gold"])) for row in found["items"])
        for how in found["conventions"]
    }
    own = found["conventions"][task.normalise]
    n, chance = found["n"], found["chance"]
    one.pop("subjects", None)
    return one | {
        "accuracy": own,
        "error": math.sqrt(own * (1 - own) / (n - 1)),
        "above": (own - chance) / (1 - chance),
        "calibration": calibration_error(*_confidences(found["items"])),
        "golds": "".join(str(row["gold"]) for row in found["items"]),
        "chosen": "".join(str(row["chosen"][task.normalise]) for row in found["items"]),
        "rights": rights,
    }


def _confidences(rows: Sequence[dict]) -> tuple[list[float], list[float]]:
    """How sure the model is of each choice by its log-likelihoods, and whether it was right."""
    pairs = [(confidence(row["nats"]), float(row["chosen"]["none"] == row["gold"])) for row in rows]
    return [sure for sure, _ in pairs], [right for _, right in pairs]


def sharing(reader: Reader, *, shots: int = 5, items: int = 16, repeats: int = 3) -> dict:
    """Seconds for questions of MMLU with examples before them, by what is read once.

    Returns:
        ``tokens`` of all rows, and ``seconds``, medians: ``apart`` every option with its whole
        prompt; ``question`` the prompt once for its options, each question with examples of its
        own; ``examples`` those once for all questions too.
    """
    task = load_suite("default").tasks["mmlu"].model_copy(update={"shots": shots})
    each = task.model_copy(update={"draw": "each"})
    ways = {"apart": (each, False), "question": (each, True), "examples": (task, True)}
    questions = load_benchmark("mmlu")
    runs, tokens = {}, {}
    for name, (way, share) in ways.items():
        posed = pose(way, questions, items)
        pairs = [reader.pair(*pair) for one in posed for pair in one.pairs]
        tokens[name] = sum(len(before) + len(after) for before, after in pairs)
        runs[name] = partial(likelihoods, reader, pairs, share=share)
    seconds = medians(runs, repeats)
    for name, took in seconds.items():
        gain = tokens[name] / took / (tokens["apart"] / seconds["apart"])
        print(f"{name:10} {took:6.2f} s  {gain:.1f} times the tokens a second", flush=True)
    about = {"task": "mmlu", "shots": shots, "items": items, "threads": torch.get_num_threads()}
    return about | {"tokens": tokens, "seconds": seconds}


class BenchEvaluate(Bench):
    """Tasks put to three models, and what sharing prompts saves: `mptbook bench evaluate`."""

    model: Path | None = Field(None, description="a model directory or run; None: mpt-tiny's")
    peer: bool = Field(True, description="beside SmolLM2-135M-Instruct, a download of 93 MB")
    tasks: list[str] = Field([], description="of the default suite; without any, all but programs")
    items: PositiveInt = Field(150, description="questions of each task")
    repeats: PositiveInt = Field(3, description="rounds of the timing")

    def compare(self) -> dict:
        suite = load_suite("default")
        names: Sequence[str] = self.tasks or [n for n in suite.tasks if n not in LEFT_OUT]
        reader = load_reader(self.model or trained("tiny"), max_tokens=MOST_TOKENS)
        readers = {TINY: reader, UNTRAINED: untrained(reader)}
        if self.peer:
            readers[SMOLLM2] = load_reader(peer_path(SMOLLM2), max_tokens=MOST_TOKENS)
        tasks = {name: suite.tasks[name] for name in names}
        return compare(readers, tasks, items=self.items, repeats=self.repeats)
