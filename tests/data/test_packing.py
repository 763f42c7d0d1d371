import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptbook.data.packing import concatenate_and_cut, document_ids

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
