"""The questions of a task: of a published set, of one that is made here, or of a file.

A file has one JSON object on a line, with the names that LLM Foundry's files have:

    choice       query, choices, gold (which of them, from 0)
    schema       context_options, continuation, gold
    completion   context, continuation
    generation   context, answer, and if there are more of them, aliases

and, of any type, `category`: a part of the set that is counted by itself.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mptbook.data.benchmarks import BENCHMARKS, Question, load_benchmark
from mptbook.data.sources import decode
from mptbook.eval.generated import GENERATED, load_generated
from mptbook.eval.tasks import Task

OnBad = Literal["skip", "stop"]


class Row(BaseModel):
    """What rows of all types may have; other columns are passed over."""

    model_config = ConfigDict(strict=True)

    category: str = ""


class ChoiceRow(Row):
    query: str
    choices: list[str] = Field(min_length=2)
    gold: int = Field(ge=0)

    def question(self, number: int) -> Question:
        gold = _within(self.gold, self.choices)
        options = tuple(self.choices)
        return Question(number, self.query, options=options, gold=gold, subject=self.category)


class SchemaRow(Row):
    context_options: list[str] = Field(min_length=2)
    continuation: str = Field(min_length=1)
    gold: int = Field(ge=0)

    def question(self, number: int) -> Question:
        gold = _within(self.gold, self.context_options)
        return Question(
            number,
            "",
            options=tuple(self.context_options),
            gold=gold,
            answers=(self.continuation,),
            subject=self.category,
        )


class CompletionRow(Row):
    context: str
    continuation: str = Field(min_length=1)

    def question(self, number: int) -> Question:
        answers = (self.continuation.strip(),)
        return Question(number, self.context, answers=answers, subject=self.category)


class GenerationRow(Row):
    context: str
    answer: str = Field(min_length=1)
    aliases: list[str] = []

    def question(self, number: int) -> Question:
        answers = (self.answer, *self.aliases)
        return Question(number, self.context, answers=answers, subject=self.category)


ROWS = {
    "choice": ChoiceRow,
    "schema": SchemaRow,
    "completion": CompletionRow,
    "generation": GenerationRow,
}


def _within(gold: int, options: list[str]) -> int:
    if gold >= len(options):
        raise ValueError(f"gold is {gold}, of {len(options)} options counted from 0")
    return gold


def load_questions(task: Task, on_bad: OnBad = "skip") -> tuple[list[Question], list[str]]:
    """The questions of a task, and of its bad rows what is wrong with each.

    Args:
        on_bad: whether a bad row of a file is left out, or an error.

    Raises:
        ValueError: if the set is unknown, no row is left, or `on_bad` says stop and one is bad:
            the message names the file, the line and the mistake.
        FileNotFoundError: if a file does not exist.
        WheelUnavailable: if the wheel of a published set can be neither found nor fetched.
    """
    if task.data in GENERATED:
        return load_generated(task.data), []
    if not task.data.endswith(".jsonl"):
        if task.data not in BENCHMARKS:
            known = ", ".join([*BENCHMARKS, *GENERATED])
            raise ValueError(
                f"{task.data} is no evaluation set; there are {known}, and .jsonl files"
            )
        return load_benchmark(task.data), []
    path = Path(task.data)
    if not path.exists():
        raise FileNotFoundError(
            f"the task file {path} does not exist; give the path of one that does"
        )
    questions, bad = [], []
    for number, line in enumerate(decode(str(path), path.read_bytes()).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            questions.append(ROWS[task.type].model_validate(json.loads(line)).question(number))
        except ValueError as error:  # of JSON, of a column, and of a gold outside of the options
            mistake = f"{path}, line {number}: {_mistake(error)}"
            if on_bad == "stop":
                raise ValueError(f"{mistake}; mend it, or take --on-bad skip") from None
            bad.append(mistake)
    if not questions:
        raise ValueError(f"{path} has no row for a task of type {task.type}; {len(bad)} are bad")
    return questions, bad


def _mistake(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON ({error})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the row"
        if first["type"] == "missing":
            return f"{name} is missing"
        return f"{name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return str(error)
