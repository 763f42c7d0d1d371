"""Evaluation sets that are made here: their answers follow from their questions.

    last-word    the last word of a passage of a held-out novel, which has been used in it before
    arithmetic   sums, differences and products of small numbers
    copying      a list of words, and the list again
    retrieval    names with numbers, and the number of one of them

The last word is asked for as in LAMBADA (Paperno et al., arXiv:1606.06031), whose passages people
looked through; these nobody did, so that some last words cannot be known.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator

from mptbook.data.benchmarks import Question
from mptbook.data.corpora import load_domain
from mptbook.eval.recall import pairs_of_names, random_name

SEED = 7
ROWS = 500
WORDS = 40, 150  # of a passage whose last word is asked for
PAIRS = 12  # names with numbers
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def load_generated(name: str) -> list[Question]:
    """The questions of a set of `GENERATED`, always the same."""
    return list(GENERATED[name]())


def _last_word() -> Iterator[Question]:
    found = load_domain("novels", "heldout")
    numbers = itertools.count(1)
    for novel, text in zip(found["name"], found["text"], strict=True):
        passage: list[str] = []
        plain = " ".join(text.replace("*", " ").split())
        for sentence in re.split(r"(?<=[.!?])\s|(?<=[.!?][\"”’])\s", plain):
            passage += sentence.split()
            if len(passage) > WORDS[1]:
                passage = sentence.split()
            last = "".join(passage[-1:]).strip(".!?\"'_”’")
            used = re.findall(r"[a-z]+", " ".join(passage[:-1]).lower())
            long_enough = len(passage) >= WORDS[0] and re.fullmatch("[a-z]{4,}", last)
            if long_enough and last in used:
                author = novel.partition(" - ")[0]
                yield Question(
                    next(numbers), " ".join(passage[:-1]), answers=(last,), subject=author
                )
                passage = []  # no word is in two passages


def _arithmetic() -> Iterator[Question]:
    source = random.Random(SEED)
    seen = set()
    while len(seen) < ROWS:
        sign = source.choice(list(OPERATIONS))
        top = 12 if sign == "*" else 100
        a, b = source.randrange(2, top), source.randrange(2, top)
        if sign == "-":
            a, b = max(a, b), min(a, b)
        if (sign, a, b) not in seen:
            seen.add((sign, a, b))
            answer = str(OPERATIONS[sign](a, b))
            yield Question(len(seen), f"{a} {sign} {b} =", answers=(answer,), subject=sign)


def _copying() -> Iterator[Question]:
    source = random.Random(SEED)
    for number in range(1, ROWS + 1):
        count = 2 + number % 7
        words = [random_name(source) for _ in range(count)]
        # All but the first word are asked for: it says where the copy begins.
        query = f"{' '.join(words)}\n{words[0]}"
        yield Question(number, query, answers=(" ".join(words[1:]),), subject=f"{count} words")


def _retrieval() -> Iterator[Question]:
    places = {"begin": 0.1, "middle": 0.5, "end": 0.9}
    for number in range(1, ROWS + 1):
        place = list(places)[number % 3]
        choice = pairs_of_names(random.Random(SEED + number), PAIRS, places[place])
        options = tuple(option.strip().removesuffix(".") for option in choice.options)
        context, query = choice.context.rstrip(), choice.question.rstrip()
        yield Question(number, query, context, options, choice.right, subject=place)


GENERATED = {
    "last-word": _last_word,
    "arithmetic": _arithmetic,
    "copying": _copying,
    "retrieval": _retrieval,
}
