"""Rows of conversations, and which of their tokens are learned.

Conversations are packed whole, many to a row, and kept apart: none sees another. A row is stored
as one number for each token, which has its id and two bits, so that rows are drawn, shuffled and
mixed like those of `mptbook prepare`.

Dimensions in this file
    N   rows
    B   rows of a batch
    T   tokens of a row that the model reads; a stored row has T + 1, the last being a target
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from mptbook.data.packing import IGNORE, best_fit

LEARNED = 1 << 29  # the bit of a token that the model learns to write
BEGINS = 1 << 30  # of the first token of a conversation
IDS = LEARNED - 1


def pack_conversations(
    examples: Sequence[tuple[list[int], list[bool]]], row_tokens: int, end_of_text: int
) -> np.ndarray:
    """Rows that hold conversations whole, filled up with `end_of_text`.

    Args:
        examples: ids of each, at most T + 1, and which of them are learned; never the first,
            which nothing of its own conversation stands before.
        row_tokens: T.

    Returns:
        (N, T + 1) int32, to be told apart by `apart`.
    """
    places = best_fit([len(ids) for ids, _ in examples], row_tokens + 1)
    rows = np.full((len(places), row_tokens + 1), end_of_text, dtype=np.int32)
    for row, inside in zip(rows, places, strict=True):
        end = 0
        for number in inside:
            ids, learned = examples[number]
            assert not learned[0]
            row[end : end + len(ids)] = np.array(ids) + LEARNED * np.array(learned)
            row[end] += BEGINS
            end += len(ids)
        if end < len(row):
            row[end] += BEGINS
    return rows


def apart(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a model reads, and learns, of stored rows.

    Args:
        inputs, targets: (B, T) int64, of one row but its last, and but its first token.

    Returns:
        (B, T) int64 each: ids; targets, `IGNORE` where nothing is learned; and which
        conversation of its row each token belongs to, counted from 1.
    """
    learned = (targets & IDS).masked_fill((targets & LEARNED) == 0, IGNORE)
    return inputs & IDS, learned, ((inputs & BEGINS) != 0).cumsum(dim=1)


class ResponseRows:
    """Rows of conversations, as `mptbook.data.loader.batches` draws them.

    Args:
        rows: of each source, (N, T + 1) int32 from `pack_conversations`.

    Attributes:
        domains: which rows are of each source.
    """

    packed = True

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self.folder = Path("the data")  # as it is called where a source is not known
        self.domains: dict[str, range] = {}
        end = 0
        for name, of_source in sorted(rows.items()):
            self.domains[name] = range(end, end + len(of_source))
            end += len(of_source)
        self._all = np.concatenate([rows[name] for name in self.domains])
        self.row_tokens = self._all.shape[1] - 1

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), T + 1) int64."""
        return self._all[rows].astype(np.int64)

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return int(((self._all[:, 1:] & LEARNED) != 0).sum())
