"""A suite of tasks put to a model: what it gets right of each, how sure that is, and the average.

    accuracy     the mean grade; of most tasks a question is right or wrong
    error        standard error of that mean, as if the questions were drawn independently
    above        (accuracy - chance) / (1 - chance): 0 for a guess, 1 for all right
    calibration  how far confidence and accuracy lie apart, the mean over 10 bins of confidence

Confidence is the softmax of what the options are compared by, at the one that was chosen.

A category is the mean of `above` over its tasks, and the average that over categories; both are
missing as long as a task of theirs is: MPT's Gauntlet is counted so.

Source: MosaicML NLP Team, LLM Foundry, `eval_gauntlet_callback`; Guo et al., arXiv:1706.04599,
section 2 (calibration).
"""

import math
import tomllib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mptbook.eval.code import run_checked
from mptbook.eval.questions import OnBad, load_questions
from mptbook.eval.reader import Reader
from mptbook.eval.score import BATCH_TOKENS, Likelihood, continuations, likelihoods
from mptbook.eval.tasks import (
    Choice,
    Completion,
    Generation,
    Normalise,
    Posed,
    Task,
    grade,
    normalised,
    pose,
)
from mptbook.settings import CONFIGS

SUITES = CONFIGS / "suites"
BINS = 10


class Suite(BaseModel):
    """Tasks by name."""

    model_config = ConfigDict(extra="forbid")

    tasks: dict[str, Task]


def load_suite(name: str) -> Suite:
    """A suite of `configs/suites`, or of a TOML file of one's own.

    Raises:
        ValueError: if there is no such suite, or a task has a setting that it cannot have.
    """
    path = SUITES / f"{name}.toml"
    if not path.exists():
        path = Path(name)
    if path.suffix != ".toml" or not path.exists():
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.toml")))
        raise ValueError(f"{name} is no suite; there are {known}, or give the path of a .toml file")
    try:
        return Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from None


def run_task(
    reader: Reader,
    task: Task,
    *,
    items: int | None = None,
    on_bad: OnBad = "skip",
    share: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """What a model makes of a task.

    Args:
        items: so many questions, chosen by the task's seed; None: all.
        on_bad, share, batch_tokens: see `load_questions` and `likelihoods`.
        progress: told how many of how many requests are done.

    Returns:
        As JSON has it: ``task`` its settings, ``n`` questions, ``bad`` rows by line, ``chance``,
        ``accuracy``, ``error``, ``above``, ``subjects``, ``truncated`` contexts, ``items``; of a
        choice ``calibration`` and ``conventions``, the accuracy by each way to normalise.
    """
    questions, bad = load_questions(task, on_bad)
    posed = pose(task, questions, items)
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    how = {"batch_tokens": batch_tokens, "report": report}
    if isinstance(task, Generation):
        total = len(posed)
        rows = _written(reader, task, posed, **how)
    else:
        pairs = [pair for one in posed for pair in (*one.pairs, *one.alone)]
        total = len(pairs)
        encoded = [reader.pair(*pair) for pair in pairs]
        found = iter(likelihoods(reader, encoded, share=share, **how))
        rows = [
            _judged(task, one, [next(found) for _ in (*one.pairs, *one.alone)]) for one in posed
        ]
    return {"task": task.model_dump(mode="json"), "bad": bad} | summary(posed, rows)


def _written(reader: Reader, task: Generation, posed: Sequence[Posed], **how) -> list[dict]:
    # The delimiter is left for the model to write, unless it is none: words begin with a blank.
    texts = continuations(
        reader,
        [one.pairs[0][0] for one in posed],
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        **how,
    )
    rows = []
    for one, text in zip(posed, texts, strict=True):
        row = {"number": one.question.number, "text": text}
        if task.grade == "program":
            outcome = run_checked(one.question.query + text, one.question.check)
            row |= {"score": float(outcome == "passed"), "outcome": outcome}
        else:
            row["score"] = grade(task, text, one.question.answers)
        rows.append(row)
    return rows


def _judged(task: Task, posed: Posed, found: Sequence[Likelihood]) -> dict:
    """A row of the result: of a question whose continuations have these likelihoods."""
    asked, alone = found[: len(posed.pairs)], found[len(posed.pairs) :]
    nats, tokens = [one.nats for one in asked], [one.tokens for one in asked]
    row = {"number": posed.question.number, "nats": [round(one, 5) for one in nats]}
    row["truncated"] = any(one.truncated for one in asked)
    if isinstance(task, Completion):
        return row | {"score": float(asked[0].greedy)}
    ways = ("none", "tokens", "bytes", "characters") if isinstance(task, Choice) else ("none",)
    chosen, gold = {}, posed.question.gold
    unasked = [one.nats for one in alone]
    for how in (*ways, *(("unconditional",) if alone else ())):
        scores = normalised(nats, tokens, posed.options, how, unasked)
        chosen[how] = scores.index(max(scores))
        if how == getattr(task, "normalise", "none"):
            row["confidence"] = confidence(scores)
            row["score"] = float(chosen[how] == gold)
    return row | {"chosen": chosen, "gold": gold}


def confidence(scores: Sequence[float]) -> float:
    """The share that the likeliest option has of the likelihood of all, from 0 to 1."""
    return 1 / sum(math.exp(score - max(scores)) for score in scores)


def summary(posed: Sequence[Posed], rows: Sequence[dict]) -> dict:
    """The figures of a task, from its rows."""
    scores = [row["score"] for row in rows]
    chance = sum(one.chance for one in posed) / len(posed)
    accuracy = sum(scores) / len(scores)
    found = {
        "n": len(rows),
        "chance": chance,
        "accuracy": accuracy,
        "error": standard_error(scores),
        "above": (accuracy - chance) / (1 - chance),
        "truncated": sum(row.get("truncated", False) for row in rows),
    }
    by_subject = defaultdict(list)
    for one, score in zip(posed, scores, strict=True):
        by_subject[one.question.subject].append(score)
    if len(by_subject) > 1:
        found["subjects"] = {
            subject: {
                "n": len(own),
                "accuracy": sum(own) / len(own),
                "error": standard_error(own),
            }
            for subject, own in sorted(by_subject.items())
        }
    if "confidence" in rows[0]:
        confidences = [row["confidence"] for row in rows]
        found["calibration"] = calibration_error(confidences, scores)
        found["conventions"] = {
            how: sum(row["chosen"][how] == row["gold"] for row in rows) / len(rows)
            for how in get_args(Normalise)
            if how in rows[0]["chosen"]
        }
    return found | {"items": list(rows)}


def standard_error(scores: Sequence[float]) -> float | None:
    """Of the mean of independent scores; None of a single one."""
    n = len(scores)
    if n < 2:
        return None
    mean = sum(scores) / n
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)


def calibration_error(confidences: Sequence[float], scores: Sequence[float]) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart in bins of confidence.

    Args:
        confidences: from 0 to 1, of the chosen options.
        scores: 1 where the choice was right, else 0.
    """
    bins = defaultdict(list)
    for confidence, score in zip(confidences, scores, strict=True):
        bins[min(int(confidence * BINS), BINS - 1)].append(confidence - score)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(scores)


def categories(suite: Suite, found: dict[str, dict]) -> dict[str, float]:
    """Each category whose tasks are all there, and if all categories are, their ``average``."""
    names = defaultdict(list)
    for name, task in suite.tasks.items():
        if task.category:
            names[task.category].append(name)
    means = {
        category: sum(found[name]["above"] for name in own) / len(own)
        for category, own in names.items()
        if all(name in found for name in own)
    }
    if means and len(means) == len(names):
        means["average"] = sum(means.values()) / len(means)
    return means
