"""Which documents are not worth a training's time: odd ones, and near copies of others.

Sources: the filters that MosaicML named for mC4 in MPT-7B's announcement (2023); Broder, "On the
resemblance and containment of documents" (1997) for near copies.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from mptbook.data.sources import Document

WORDS = (200, 50_000)  # fewest, most
LEAST_ALPHANUMERIC = 0.92  # of the characters that are not white space
LONG = 500  # words, above which a text is long
MOST_COMMON = 0.075, 0.30  # largest share of one word, in a long text and in a short one
RUN = 5  # words that are compared at a time


def unfit(text: str) -> str:
    """Why a text is no prose worth reading, in a word or two; "" where it is.

    The rules are those that MPT-7B's mC4 had to pass. White space counts as no character:
    with it no English text would pass.
    """
    words = text.split()
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return "too short" if len(words) < WORDS[0] else "too long"
    characters = Counter("".join(words))
    (commonest, _), *_ = characters.most_common(1)
    if not commonest.isalpha():
        return "commonest character"
    alphanumeric = sum(n for character, n in characters.items() if character.isalnum())
    if alphanumeric < LEAST_ALPHANUMERIC * characters.total():
        return "too few letters"
    ((_, times),) = Counter(words).most_common(1)
    if times > MOST_COMMON[len(words) <= LONG] * len(words):
        return "a word too often"
    return ""


class Cleaner:
    """Passes on the documents that are fit and no near copy of an earlier one.

    Args:
        filtered: whether a document must pass `unfit`.
        near_copies: drop a document whose runs of five words overlap so much with those of an
            earlier one, as the size of what they share over that of what they have together
            (Jaccard's index), estimated to within about 0.05; None keeps all.

    Attributes:
        dropped: how many documents were not passed on, by reason.

    Raises:
        ValueError: if `near_copies` is asked for and datasketch is not installed.
    """

    def __init__(self, filtered: bool = False, near_copies: float | None = None) -> None:
        self.filtered = filtered
        self.dropped: Counter[str] = Counter()
        self._near_copies = near_copies
        if near_copies is not None:
            try:
                from datasketch import MinHashLSH
            except ImportError:
                raise ValueError(
                    "near copies are found with datasketch, which is not here; "
                    "pip install 'mptbook[data]'"
                ) from None
            self._seen = MinHashLSH(threshold=near_copies, num_perm=256)

    def kept(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that are not dropped, in their order."""
        for number, document in enumerate(documents):
            reason = unfit(document.text) if self.filtered else ""
            if not reason and self._near_copies is not None:
                reason = self._copied(str(number), document.text)
            if reason:
                self.dropped[reason] += 1
            else:
                yield document

    def _copied(self, key: str, text: str) -> str:
        from datasketch import MinHash

        words = text.split()
        runs = {" ".join(words[n : n + RUN]) for n in range(max(1, len(words) - RUN + 1))}
        sketch = MinHash(num_perm=256)
        sketch.update_batch([run.encode() for run in runs])
        if self._seen.query(sketch):
            return "near copy"
        self._seen.insert(key, sketch)
        return ""
