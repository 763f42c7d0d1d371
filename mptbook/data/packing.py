"""Documents to rows: concatenate, separate by end-of-text, cut every T tokens.

Dimensions in this file
    N   rows
    T   tokens of a row that the model reads; a stored row has T + 1, the last being a target
"""

from collections.abc import Iterable

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
