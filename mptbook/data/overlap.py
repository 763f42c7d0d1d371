"""What must not be trained on: conversations that hold a question of an evaluation set.

Both are compared by their runs of five words, in lower case and without punctuation. A question
that stands in a conversation word for word is an exact match; one of whose runs at least four in
five do is a near match. So a question is found within a longer prompt, too.

Source: Brown et al., "Language models are few-shot learners", arXiv:2005.14165, appendix C (runs
of words of a test set in the training data).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mptbook.data.benchmarks import Question

RUN = 5  # words that are compared at a time
NEAR = 0.8  # of the runs of a question
WORD = re.compile(r"\w+")


class Overlap:
    """Finds questions of evaluation sets in texts.

    Args:
        questions: of each set by its name. With a context, that is looked for as well: it alone
            would let a model recall what is asked about it.
    """

    def __init__(self, questions: Mapping[str, Iterable[Question]]) -> None:
        self._texts: list[tuple[str, tuple[str, ...], int]] = []  # set, words, different runs
        self._having: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._short: dict[tuple[str, ...], str] = {}
        for name, of_set in questions.items():
            for question in of_set:
                self._add(name, question.query)
                self._add(name, question.context)

    def _add(self, name: str, text: str) -> None:
        words = tuple(WORD.findall(text.lower()))
        if len(words) < RUN:
            if words:
                self._short.setdefault(words, name)
            return
        runs = set(_runs(words))
        for run in runs:
            self._having[run].append(len(self._texts))
        self._texts.append((name, words, len(runs)))

    def find(self, texts: Sequence[str]) -> tuple[str, str] | None:
        """A set of which a question stands in one of the texts, and `exact` or `near`; or None.

        A question of fewer than five words counts only where a whole line has no other words.
        """
        near = None
        for text in texts:
            for line in text.split("\n"):
                name = self._short.get(tuple(WORD.findall(line.lower())))
                if name is not None:
                    return name, "exact"
            words = tuple(WORD.findall(text.lower()))
            hits: Counter[int] = Counter()
            for run in set(_runs(words)):
                hits.update(self._having.get(run, ()))
            joined = f" {' '.join(words)} "
            for number, n in hits.items():
                name, sought, n_runs = self._texts[number]
                if n >= NEAR * n_runs:
                    if f" {' '.join(sought)} " in joined:
                        return name, "exact"
                    near = near or (name, "near")
        return near


def _runs(words: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (words[n : n + RUN] for n in range(len(words) - RUN + 1))
