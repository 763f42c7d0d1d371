"""Questions about a context that only one who has read it can answer."""

import random
import re
from dataclasses import dataclass

from mptbook.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Choice:
    """A question about a context: which of the options goes on with it."""

    context: str
    question: str
    options: list[str]
    right: int  # index into `options`


def key_values(
    tokenizer: Tokenizer, n_tokens: int, place: float, seed: int, n_options: int = 4
) -> Choice:
    """A list of random names and numbers of about `n_tokens`, and a question for one of them.

    Args:
        place: of the pair that is asked for, from 0, the begin of the list, to 1, its end.
        n_options: numbers to choose from; all stand in the list.

    Source: the task of Liu et al., "Lost in the Middle", arXiv:2307.03172, section 3.
    """
    source = random.Random(seed)
    per_line = len(tokenizer.encode(LINE.format(random_name(source), _number(source))))
    return pairs_of_names(source, n_tokens // per_line, place, n_options)


LINE = "The number of {} is {}.\n"


def pairs_of_names(source: random.Random, n_pairs: int, place: float, n_options: int = 4) -> Choice:
    """As `key_values`, a list of `n_pairs`, or of `n_options` where that is more."""
    numbers: dict[str, str] = {}  # of each name once, so that a question has one answer
    while len(numbers) < max(n_options, n_pairs):
        numbers[random_name(source)] = _number(source)
    pairs = list(numbers.items())
    asked = round(place * (len(pairs) - 1))
    name, number = pairs[asked]
    others = source.sample(sorted(set(numbers.values()) - {number}), n_options - 1)
    options = [number, *others]
    source.shuffle(options)
    return Choice(
        context="".join(LINE.format(*pair) for pair in pairs),
        question=f"The number of {name} is ",
        options=[f"{option}.\n" for option in options],
        right=options.index(number),
    )


def random_name(source: random.Random) -> str:
    """Three syllables that mean nothing."""
    return "".join(source.choice("bdfgklmnprst") + source.choice("aeiou") for _ in range(3))


def _number(source: random.Random) -> str:
    return str(source.randrange(10_000, 100_000))


def book_question(
    book: str, tokenizer: Tokenizer, n_tokens: int, place: float, seed: int, n_options: int = 4
) -> Choice:
    """The begin of a book, and the first half of one of its sentences to be completed.

    The options are second halves of sentences of the same book, one of them the right one, so
    that style and names do not give it away: it takes having read the sentence.

    Args:
        n_tokens: of the book that are read.
        place: where the sentence stands in them, from 0 to 1.

    Raises:
        ValueError: if the book is shorter, or has too few sentences of 12 to 40 words.
    """
    source = random.Random(seed)
    ids = tokenizer.encode(book)
    if len(ids) < n_tokens:
        raise ValueError(f"the book has {len(ids)} tokens, {n_tokens} are asked for")
    context = tokenizer.decode(ids[:n_tokens])
    found = [
        (match.start(), match[0])
        for match in re.finditer(r"[A-Z][^.!?]*[.!?]", context)
        if 12 <= len(match[0].split()) <= 40
    ]
    if len(found) < 2 * n_options:
        raise ValueError(
            f"{len(found)} sentences of 12 to 40 words stand in {n_tokens} tokens of the book; "
            f"{2 * n_options} are needed, so read more"
        )
    # Of the sentences nearest to the place, one by chance.
    near = sorted(found, key=lambda item: abs(item[0] - place * len(context)))[: n_options + 1]
    at, sentence = source.choice(near)
    others = source.sample([text for start, text in found if start != at], n_options - 1)
    options = [_halves(text)[1] for text in (sentence, *others)]
    right = options[0]
    source.shuffle(options)
    return Choice(context, "\n\n" + _halves(sentence)[0], options, options.index(right))


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " " + " ".join(words[middle:])
