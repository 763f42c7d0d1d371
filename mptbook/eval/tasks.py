"""Tasks: how a question is put to a model, and what counts as a right answer.

There are four types, those of MPT's own evaluation. They differ in what the model is asked for:

    choice       how likely each option is, after the same prompt
    schema       how likely the same continuation is, after each of several prompts
    completion   whether its likeliest tokens are the continuation
    generation   a text, which is compared with the answers

Published figures for one and the same set of questions differ by how it was put. What can differ
is a setting of the task here, and every result carries the settings that it was found with.

Sources: MosaicML NLP Team, LLM Foundry, `in_context_learning_evaluation`; Gao et al.,
lm-evaluation-harness; Brown et al., arXiv:2005.14165, section 2.4 (`unconditional`).
"""

import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from mptbook.data.benchmarks import Question

Normalise = Literal["none", "tokens", "bytes", "characters", "unconditional"]
FIELDS = {"context", "query", "options"}
LETTERS = string.ascii_uppercase


class Conventions(BaseModel):
    """What all types of task have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(description="an evaluation set, a generated one, or the path of a .jsonl")
    category: str = Field("", description="of the suite; tasks without one count in none")
    prompt: str = Field(
        "{query}", description="of {context}, {query}, {options}; options as lines A. B. ..."
    )
    instruction: str = Field("", description="before everything else")
    shots: NonNegativeInt = Field(0, description="answered examples before the question")
    draw: Literal["once", "each"] = Field(
        "once",
        description="once: the same examples before all questions, and they are not asked; each: "
        "others before each question",
    )
    seed: int = Field(1234, description="of the examples")
    between: str = Field("\n\n", description="after each example")
    delimiter: str = Field(" ", description="between a prompt and its answer")

    @field_validator("prompt")
    @classmethod
    def _has_known_fields(cls, prompt: str) -> str:
        names = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        if names - FIELDS:
            unknown = ", ".join(sorted(names - FIELDS))
            raise ValueError(f"the prompt has {{{unknown}}}; it can have {sorted(FIELDS)}")
        return prompt


class Choice(Conventions):
    """Which of the options is likeliest after the prompt."""

    type: Literal["choice"] = "choice"
    answer: Literal["option", "letter"] = Field(
        "option", description="what follows the prompt: the text of an option, or its letter"
    )
    normalise: Normalise = Field(
        "none",
        description="none: log-likelihood (acc of lm-evaluation-harness); characters: over those "
        "of the option (its acc_norm); bytes: over those (its acc_bytes); tokens: over those (LLM "
        "Foundry); unconditional: less that of the option alone (acc_mutual_info)",
    )
    alone: str = Field("", description="what stands before an option alone; GPT-3 took Answer:")


class Schema(Conventions):
    """After which of the options, as prompts, a continuation is likeliest."""

    type: Literal["schema"] = "schema"


class Completion(Conventions):
    """Whether every token of the continuation is the likeliest."""

    type: Literal["completion"] = "completion"


class Generation(Conventions):
    """Whether what the model writes is one of the answers."""

    type: Literal["generation"] = "generation"
    max_new_tokens: PositiveInt = Field(32, description="tokens at most")
    stop: tuple[str, ...] = Field(("\n",), description="what ends the text")
    after: str = Field("", description="only what follows this counts: the end of a derivation")
    grade: Literal["exact", "contains", "f1", "number", "program"] = Field(
        "exact",
        description="exact: an answer, but for case, articles, punctuation; contains: one is in "
        "it; f1: words in common; number: the first number is the answer's; program: it runs and "
        "passes its checks",
    )


Task = Annotated[Choice | Schema | Completion | Generation, Field(discriminator="type")]


@dataclass(frozen=True)
class Posed:
    """A question as it is put: each continuation after its prompt.

    Attributes:
        options: what lengths are counted of; without the delimiter.
        alone: the prompt and continuation of each option without the question, if asked for.
    """

    question: Question
    pairs: tuple[tuple[str, str], ...]
    options: tuple[str, ...]
    alone: tuple[tuple[str, str], ...] = ()

    @property
    def chance(self) -> float:
        """How often a guess is right."""
        return 1 / len(self.pairs) if self.question.gold is not None else 0.0


def pose(task: Task, questions: Sequence[Question], items: int | None = None) -> list[Posed]:
    """The questions as they are put, with their examples.

    Args:
        items: so many of the questions, chosen by `task.seed`; None: all.

    Raises:
        ValueError: if there are not enough questions, or one lacks what the type needs.
    """
    for question in questions:
        _check(task, question)
    if len(questions) <= task.shots:
        raise ValueError(
            f"{task.data} has {len(questions)} questions, too few for {task.shots} examples and "
            "one to ask"
        )
    source = random.Random(task.seed)
    examples = source.sample(list(questions), task.shots) if task.draw == "once" else []
    asked = [question for question in questions if question not in examples]
    if items is not None and items < len(asked):
        asked = sorted(source.sample(asked, items), key=lambda question: question.number)
    posed = []
    for question in asked:
        if task.draw == "each" and task.shots:
            own = random.Random(f"{task.seed} {question.number}")
            others = [other for other in questions if other is not question]
            examples = own.sample(others, task.shots)
        shown = "".join(_example(task, example) + task.between for example in examples)
        posed.append(_posed(task, question, task.instruction + shown))
    return posed


def _check(task: Task, question: Question) -> None:
    chooses = isinstance(task, Choice | Schema)
    if chooses and question.gold is None:
        raise ValueError(f"question {question.number} of {task.data} has no options to choose from")
    if not isinstance(task, Choice) and not question.answers:
        raise ValueError(f"question {question.number} of {task.data} has no answers; ask a choice")


def _posed(task: Task, question: Question, before: str) -> Posed:
    if isinstance(task, Schema):
        continuation = task.delimiter + question.answers[0]
        prompts = (before + _filled(task, question, option) for option in question.options)
        pairs = tuple((prompt, continuation) for prompt in prompts)
        return Posed(question, pairs, (question.answers[0],) * len(pairs))
    prompt = before + _filled(task, question, question.query)
    if isinstance(task, Choice):
        options = question.options if task.answer == "option" else LETTERS[: len(question.options)]
        continuations = [task.delimiter + option for option in options]
        alone = [(task.alone, one) for one in continuations]
        return Posed(
            question,
            tuple((prompt, one) for one in continuations),
            tuple(options),
            tuple(alone if task.normalise == "unconditional" else ()),
        )
    return Posed(question, ((prompt, task.delimiter + question.answers[0]),), question.answers[:1])


def _filled(task: Task, question: Question, query: str) -> str:
    lines = (f"{letter}. {one}" for letter, one in zip(LETTERS, question.options, strict=False))
    options = "\n".join(lines)
    prompt = task.prompt.format(context=question.context, query=query, options=options)
    return prompt.lstrip() if not question.context and "{context}" in task.prompt else prompt


def _example(task: Task, question: Question) -> str:
    posed = _posed(task, question, "")
    return "".join(posed.pairs[question.gold or 0])


def normalised(
    nats: Sequence[float],
    tokens: Sequence[int],
    options: Sequence[str],
    how: Normalise,
    alone: Sequence[float] = (),
) -> list[float]:
    """What the options of a question are compared by.

    Args:
        nats, tokens: log-likelihood and length of each continuation, its delimiter included.
        options: the continuations without the delimiter, whose bytes and characters count.
        alone: log-likelihoods without the question, for `unconditional`.
    """
    if how == "unconditional":
        return [one - other for one, other in zip(nats, alone, strict=True)]
    lengths = {
        "none": [1] * len(nats),
        "tokens": tokens,
        "characters": [len(option) for option in options],
        "bytes": [len(option.encode()) for option in options],
    }[how]
    return [one / length for one, length in zip(nats, lengths, strict=True)]


def grade(task: Generation, text: str, answers: Sequence[str]) -> float:
    """From 0 to 1, how right a text is; programs are graded in `mptbook.eval.code`."""
    if task.after:
        text = text.rpartition(task.after)[2]
    if task.grade == "number":
        found, wanted = _number(text), _number(answers[0])
        if wanted is not None:
            return float(found == wanted)
    said = _words(text)
    best = 0.0
    for answer in map(_words, answers):
        if task.grade == "contains":
            right = bool(answer) and f" {' '.join(answer)} " in f" {' '.join(said)} "
        elif task.grade == "f1":
            right = _f1(said, answer)
        else:
            right = said == answer
        best = max(best, float(right))
    return best


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD's evaluation compares answers."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _number(text: str) -> float | None:
    found = re.search(r"-?\d[\d,]*(\.\d+)?", text)
    return float(found[0].replace(",", "")) if found else None


def _f1(said: list[str], answer: list[str]) -> float:
    common = sum((Counter(said) & Counter(answer)).values())
    return 2 * common / (len(said) + len(answer)) if common else float(said == answer)
