import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptbook.data.packing import (
    IGNORE,
    best_fit,
    concatenate_and_cut,
    document_ids,
    pack_whole,
    without_first_tokens,
)

END = 0


def test_rows_by_hand():
    rows, rest = concatenate_and_cut([[1, 2, 3], [4], [5, 6]], row_tokens=4, end_of_text=END)
    # 1 2 3 0 4 0 5 6 0: two rows of 4 + 1 that share the token between them
    assert rows.tolist() == [[1, 2, 3, 0, 4], [4, 0, 5, 6, 0]]
    assert rest.tolist() == [0]


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=8),
    st.integers(1, 7),
)
def test_every_token_but_the_first_is_a_target_once(documents, row_tokens):
    rows, rest = concatenate_and_cut(documents, row_tokens, END)
    stream = [token for ids in documents for token in [*ids, END]]
    assert [*rows[:, 1:].flatten(), *rest[1:]] == stream[1:]
    assert (rows[1:, 0] == rows[:-1, -1]).all()
    assert len(rest) <= row_tokens


def test_no_documents_give_no_rows():
    rows, rest = concatenate_and_cut([], 5, END)
    assert rows.shape == (0, 6)
    assert rest.size == 0


def test_a_row_of_nothing_is_refused():
    with pytest.raises(ValueError, match="row_tokens is 0"):
        concatenate_and_cut([[1]], 0, END)


def test_an_end_of_text_belongs_to_the_document_it_ends():
    # the published vector of llm-foundry's tests for an end-of-text of 5
    inputs = torch.tensor([[0, 1, 2, 5, 0, 1, 5, 0, 6]])
    assert document_ids(inputs, end_of_text=5).tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2]]


def test_rows_are_int32_and_whatever_the_ids_keep_their_value():
    rows, _ = concatenate_and_cut([[70_000, 3]], row_tokens=2, end_of_text=END)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[70_000, 3, 0]]


def test_the_published_vectors_of_llm_foundrys_packer():
    assert best_fit([1, 2, 4, 3], 5) == [[2, 0], [3, 1]]
    rows = best_fit([1, 2, 4, 4], 5)
    assert rows[:2] == [[2, 0], [3]]  # two rows, as that test asks for
    assert rows[2] == [1]  # what is left over: 2 of 11 tokens


lengths = st.lists(st.integers(1, 20), max_size=60)


@given(lengths)
def test_every_item_is_in_one_row_and_no_row_overflows(items):
    rows = best_fit(items, 20)
    assert sorted(n for row in rows for n in row) == list(range(len(items)))
    assert all(sum(items[n] for n in row) <= 20 for row in rows)


@given(lengths)
def test_two_rows_are_never_both_half_empty(items):
    """Else the items of one would have been put into the other: so at most twice the rows."""
    filled = sorted(sum(items[n] for n in row) for row in best_fit(items, 20))
    assert all(a + b > 20 for a, b in itertools.pairwise(filled))


def test_whole_documents_by_hand():
    rows, filling = pack_whole([[1, 2], [3, 4, 5], [6]], row_tokens=6, end_of_text=END)
    assert rows.tolist() == [[3, 4, 5, END, 1, 2, END], [6, END, END, END, END, END, END]]
    assert filling == 5


documents = st.lists(st.lists(st.integers(1, 9), max_size=25), min_size=1, max_size=8)


@given(documents, st.integers(1, 9))
def test_packed_documents_are_predicted_but_for_their_first_tokens(texts, row_tokens):
    rows, filling = pack_whole(texts, row_tokens, END)
    block = torch.from_numpy(rows).long()
    x, y = block[:, :-1], block[:, 1:]
    kept = without_first_tokens(x, y, END)
    assert (kept[kept != IGNORE] == y[kept != IGNORE]).all()
    # Every token of a document but its first, and its end.
    n_targets = sum(len(text) for text in texts)
    assert (kept != IGNORE).sum() == n_targets
    assert filling == rows.size - (kept != IGNORE).sum() - _pieces(texts, row_tokens)


def _pieces(texts, row_tokens):
    """Rows' worth of pieces: the first token of each is no target."""
    return sum(max(1, -(-len(text) // row_tokens)) for text in texts)


def test_a_packed_document_is_never_split_where_it_fits_a_row():
    rows, _ = pack_whole([[n] * 5 for n in range(1, 8)], row_tokens=12, end_of_text=END)
    for n in range(1, 8):
        (row,) = [row for row in rows.tolist() if n in row]
        start = row.index(n)
        assert row[start : start + 6] == [n] * 5 + [END]


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="item 1 has length 6, a row holds 5"):
        best_fit([5, 6], 5)
