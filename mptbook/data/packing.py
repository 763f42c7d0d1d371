"""Documents to rows: laid end to end and cut, or packed whole.

Dimensions in this file
    N   rows
    T   tokens of a row that the model reads; a stored row has T + 1, the last being a target
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a target that costs nothing


def concatenate_and_cut(
    documents: Iterable[list[int]], row_tokens: int, end_of_text: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of documents laid end to end, and the tokens left over.

    Each document is followed by `end_of_text`. Row n holds tokens n*T to (n+1)*T inclusive:
    neighbouring rows share one token, so that every token but the very first is a target once.

    Args:
        documents: token ids of each document.
        row_tokens: T.

    Returns:
        (N, T + 1) int32, and the fewer than T + 1 remaining tokens, int32.

    Raises:
        ValueError: if `row_tokens` is below 1.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens is {row_tokens}; a row needs at least one token")
    parts = [np.asarray([*ids, end_of_text], dtype=np.int32) for ids in documents]
    stream = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    n_rows = max(0, (len(stream) - 1) // row_tokens)
    starts = np.arange(n_rows)[:, None] * row_tokens
    return stream[starts + np.arange(row_tokens + 1)], stream[n_rows * row_tokens :]


def pack_whole(
    documents: Iterable[Sequence[int]], row_tokens: int, end_of_text: int
) -> tuple[np.ndarray, int]:
    """Rows that hold documents whole, each followed by `end_of_text`.

    What a row has left is filled with further `end_of_text`. A document that is longer than a
    row is cut as `concatenate_and_cut` does, and its last piece packed like a document.

    Args:
        documents: token ids of each.
        row_tokens: T.

    Returns:
        (N, T + 1) int32, and how many tokens are filling.

    Raises:
        ValueError: if `row_tokens` is below 1.
    """
    pieces: list[np.ndarray] = []
    for ids in documents:
        whole, rest = concatenate_and_cut([ids], row_tokens, end_of_text)
        pieces += [*whole, *([rest] if len(rest) > 1 or not len(whole) else [])]
    places = best_fit([len(piece) for piece in pieces], row_tokens + 1)
    rows = np.full((len(places), row_tokens + 1), end_of_text, dtype=np.int32)
    for row, inside in zip(rows, places, strict=True):
        ids = np.concatenate([pieces[n] for n in inside])
        row[: len(ids)] = ids
    return rows, rows.size - sum(map(len, pieces))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which items share a row, so that few rows are needed.

    The longest first, each into the row that it fits into most closely, or into a new one
    (best-fit decreasing; Ding et al., arXiv:2404.10830, section 3.2).

    Args:
        lengths: of the items, at most `capacity` each.

    Returns:
        Indices of the items of each row.

    Raises:
        ValueError: if an item is longer than a row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for item in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if lengths[item] > capacity:
            raise ValueError(f"item {item} has length {lengths[item]}, a row holds {capacity}")
        place = bisect_left(open_rows, (lengths[item], 0))
        if place == len(open_rows):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(item)
        if room > lengths[item]:
            insort(open_rows, (room - lengths[item], row))
    return rows


def without_first_tokens(inputs: Tensor, targets: Tensor, end_of_text: int) -> Tensor:
    """Targets, with `IGNORE` for the first token of each document but the first of a row.

    Nothing of its own document stands before it. What fills a row up costs nothing either.

    Args:
        inputs, targets: (B, T) int64.
    """
    return targets.masked_fill(inputs == end_of_text, IGNORE)


def document_ids(inputs: Tensor, end_of_text: int) -> Tensor:
    """Which document of its row each token belongs to, counted from 0.

    An end-of-text belongs to the document that it ends.

    Args:
        inputs: (B, T) int64.

    Returns:
        (B, T) int64.
    """
    ended = (inputs == end_of_text).cumsum(dim=1)
    return torch.nn.functional.pad(ended[:, :-1], (1, 0))
