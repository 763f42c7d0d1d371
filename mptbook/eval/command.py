"""The verb `mptbook evaluate`: held-out bits per byte, or a suite of tasks."""

import os
import time
from functools import partial
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mptbook import world
from mptbook.data.benchmarks import BENCHMARKS
from mptbook.directory import find_directory
from mptbook.eval.code import isolation
from mptbook.eval.peer import PEERS, peer_path
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.eval.questions import OnBad, load_questions
from mptbook.eval.reader import load_reader
from mptbook.eval.results import Results, draw, model_digest, table, task_key
from mptbook.eval.score import BATCH_TOKENS
from mptbook.eval.suite import Suite, categories, load_suite, run_task
from mptbook.eval.tasks import Task, pose
from mptbook.fsdp import Sharding, load_sharded
from mptbook.infer.load import is_packed_directory, load
from mptbook.infer.text import check_vocabulary
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

OF_SUITES = {"tasks", "items", "on_bad", "max_tokens", "batch_tokens", "share", "out", "figure"}
SECONDS_BETWEEN_LINES = 10  # where the output is not a terminal


class Evaluate(RunSettings):
    """Bits per byte of held-out texts by domain, or tasks: `mptbook evaluate DIR --suite default`.

    With --suite, DIR can be any causal language model that transformers loads: a directory, a
    .gguf file, a name on the hub; or smollm2-135m-instruct, which comes in a pinned wheel.
    """

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    source: dict[str, str] = Field(
        {}, description="domain=SOURCE; without any, the default domains (see mptbook corpora)"
    )
    precision: Precision = Field("auto", description="auto: bf16 where the device has units for it")
    fsdp: Sharding = Sharding()
    device: str = Field("auto", description="cpu, cuda, or auto")
    patience: PositiveInt = Field(
        600, description="seconds that a process waits for another, under torchrun"
    )
    suite: str = Field("", description="tasks to put: default, gauntlet, or the path of a .toml")
    tasks: list[str] = Field([], description="names of the suite's tasks; without any, all")
    items: PositiveInt | None = Field(None, description="questions of each task; all if not given")
    on_bad: OnBad = Field("skip", description="what a bad row of a task file does: skip or stop")
    max_tokens: NonNegativeInt = Field(
        0, description="that the model reads at most; 0: as many as it was trained on"
    )
    batch_tokens: PositiveInt = Field(BATCH_TOKENS, description="of all rows read at a time")
    share: bool = Field(True, description="read what prompts have in common once")
    out: Path | None = Field(
        None, description="results as JSON; one that exists is gone on with, not run again"
    )
    figure: Path | None = Field(None, description="bars of accuracy, as .svg or .png")

    def run(self) -> None:
        for name in sorted(self.model_fields_set & ({"source"} if self.suite else OF_SUITES)):
            way_out = "leave one of them out" if self.suite else "add --suite default"
            raise ValueError(
                f"{name} has no effect with{'' if self.suite else 'out'} a suite; {way_out}"
            )
        if self.suite:
            self._run_suite(load_suite(self.suite))
        else:
            self._run_texts()

    def _run_texts(self) -> None:
        device = world.device(self.device)
        with world.joined(device, self.patience):
            if world.size() == 1 and is_packed_directory(self.model):
                model = load(self.model, device=device)
            else:
                model = load_sharded(self.model, self.fsdp, device)
            self._evaluate(model, Tokenizer.load(find_directory(self.model)))

    def _evaluate(self, model: MPT, tokenizer: Tokenizer) -> None:
        from mptbook.data.corpora import default_domains, load_domain  # most of a second

        check_vocabulary(tokenizer, model.config.vocab_size)
        total = Prediction(0.0, 0, 0)
        for name, source in (self.source or dict.fromkeys(default_domains())).items():
            domain = partial(load_domain, name, "heldout", source)
            texts = world.from_first(lambda domain=domain: domain()["text"][:])
            found = perplexity(model, tokenizer, texts, precision=self.precision)
            total += found
            if world.rank() == 0:
                print(f"{name}: {found.bits_per_byte:.3f} bits per byte ({found.bytes:,} bytes)")
        if world.rank() == 0:
            print(f"all: {total.bits_per_byte:.3f} bits per byte")

    def _run_suite(self, suite: Suite) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says so
        if processes > 1:
            raise ValueError(
                f"a suite is run by one process, and here are {processes}; start it without "
                "torchrun, on several GPUs with --tasks once for each"
            )
        unknown = [name for name in self.tasks if name not in suite.tasks]
        if unknown:
            raise ValueError(
                f"{unknown[0]} is no task of the suite; it has {', '.join(suite.tasks)}"
            )
        chosen = {name: suite.tasks[name] for name in self.tasks or suite.tasks}
        for task in chosen.values():  # before hours are spent on the first of them
            pose(task, load_questions(task, self.on_bad)[0], 1)
        path = peer_path(self.model) if self.model in PEERS else self.model
        reader = load_reader(
            path,
            device=world.device(self.device),
            precision=self.precision,
            max_tokens=self.max_tokens,
        )
        about = {"path": str(self.model), "digest": model_digest(path, reader)}
        results = Results(self.out, about | {"max_tokens": reader.max_tokens})
        _say_licences(chosen)
        tasks: dict[str, dict] = {}
        for name, task in chosen.items():
            key = task_key(
                task,
                items=self.items,
                max_tokens=reader.max_tokens,
                precision=self.precision,
                on_bad=self.on_bad,
            )
            if results.found(name, key):
                tasks[name] = results.tasks[name]
                print(f"{name}: found before, {tasks[name]['accuracy']:.3f}")
                continue
            began = time.monotonic()
            with Shown(name) as shown:
                found = run_task(
                    reader,
                    task,
                    items=self.items,
                    on_bad=self.on_bad,
                    share=self.share,
                    batch_tokens=self.batch_tokens,
                    progress=shown,
                )
            seconds = round(time.monotonic() - began, 2)
            tasks[name] = {"items_asked_for": self.items, "seconds": seconds} | found
            results.add(name, key, tasks[name])
            results.write(categories(suite, tasks))
            _say(name, found, seconds)
        means = categories(suite, tasks)
        Console().print(table(tasks, means))
        if self.out is not None:
            print(f"written to {self.out}")
        if self.figure is not None:
            draw({str(self.model): tasks}, self.figure)
            print(f"drawn in {self.figure}")


def _say_licences(chosen: dict[str, Task]) -> None:
    for data in dict.fromkeys(task.data for task in chosen.values()):
        if data in BENCHMARKS:
            print(f"{data}: {BENCHMARKS[data].source}. Licence: {BENCHMARKS[data].licence}")
    if any(getattr(task, "grade", "") == "program" for task in chosen.values()):
        way = "without network" if isolation() else "this system keeps no network from it, so"
        closed = "" if isolation() else " Python's sockets are closed to it"
        print(f"what the model writes is run: with little time and memory, {way}{closed}")


def _say(name: str, found: dict, seconds: float) -> None:
    print(f"{name}: {found['accuracy']:.3f} of {found['n']:,} in {seconds:.1f} s", flush=True)
    if found["truncated"]:
        print(f"  {found['truncated']} were longer than the model reads, and lost their begin")
    if found["bad"]:
        print(f"  {len(found['bad'])} bad rows were left out:")
        for mistake in found["bad"][:20]:
            print(f"    {mistake}")
        if len(found["bad"]) > 20:
            print(f"    and {len(found['bad']) - 20} more")


class Shown:
    """A bar on a terminal; elsewhere a line now and then. Call it with (done, total)."""

    def __init__(self, name: str) -> None:
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(TextColumn(name), *columns, transient=True)
        self._task = self._bar.add_task(name, total=None)
        self._name, self._said = name, time.monotonic()

    def __enter__(self) -> "Shown":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self._bar.console.is_terminal and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            print(f"{self._name}: {done:,} of {total:,}", flush=True)
