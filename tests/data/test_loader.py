"""The order of the data with batches left out."""

import itertools

import numpy as np

from mptbook.data.loader import batches


class Numbers:
    """Rows that tell their number."""

    def __len__(self):
        return 40

    def __getitem__(self, rows):
        return np.stack([rows, rows], axis=1)


def first_tokens(n, **how):
    stream = batches(Numbers(), 4, seed=3, **how)
    return [inputs[:, 0].tolist() for inputs, _ in itertools.islice(stream, n)]


def test_batches_that_are_left_out_are_not_given_and_the_others_move_up():
    every = first_tokens(12)
    expected = [batch for at, batch in enumerate(every) if at not in (2, 3, 7)]
    assert first_tokens(9, skipped=[2, 3, 7]) == expected


def test_a_start_counts_the_batches_that_were_given():
    expected = first_tokens(9, skipped=[2, 3, 7])
    for start in range(9):
        assert first_tokens(9 - start, start=start, skipped=[2, 3, 7]) == expected[start:]


def test_each_process_leaves_out_its_part_of_the_same_batch():
    whole = first_tokens(5, skipped=[1])
    parts = [first_tokens(5, skipped=[1], rank=rank, world=2) for rank in (0, 1)]
    for batch, even, odd in zip(whole, *parts, strict=True):
        assert (even, odd) == (batch[::2], batch[1::2])
