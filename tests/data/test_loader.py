"""The order of the data: with batches left out, with longer rows, from a mixture."""

import itertools
from typing import ClassVar

import numpy as np
import pytest

from mptbook.data.loader import Rows, batches, drawn, row_numbers
from mptbook.data.mixture import Mixture

ROW = 16  # tokens of a row of the fixture `data`


class Numbers:
    """Rows that tell their number."""

    domains: ClassVar = {"a": range(25), "b": range(25, 40)}

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


def test_neighbouring_rows_join_to_longer_ones(data):
    short, long = Rows(data), Rows(data, 3 * ROW)
    (every,) = [short[np.arange(3 * len(long))]]
    joined = every[:, :-1].reshape(-1, 3 * ROW)
    assert (long[np.arange(len(long))][:, :-1] == joined).all()
    assert (long[np.arange(len(long))][:, -1] == every[2::3, -1]).all()
    assert long.domains == {"hares": range(len(short) // 3)}


def test_rows_that_cannot_be_joined_are_refused(data):
    with pytest.raises(ValueError, match=rf"row_tokens={ROW + 1} is not a multiple of .* {ROW}, "):
        Rows(data, ROW + 1)
    with pytest.raises(ValueError, match=r"hares in .* has no row of \d+ tokens; take fewer"):
        Rows(data, ROW * 10_000)


MIX = Mixture({"a": 1, "b": 2})


def test_a_mixture_draws_each_domain_in_epochs_of_its_own():
    domains = {"a": range(5), "b": range(5, 12)}
    steps = [row_numbers(domains, 4, (3,), step, MIX) for step in range(30)]
    order = np.concatenate(steps)
    for domain in domains.values():
        of_it = order[np.isin(order, domain)]
        n = len(domain)
        epochs = [of_it[k : k + n] for k in range(0, len(of_it) - n + 1, n)]
        assert len(epochs) > 4
        assert all(sorted(epoch) == list(domain) for epoch in epochs)
        assert any((epoch != epochs[0]).any() for epoch in epochs)


@pytest.mark.parametrize("mixture", [None, MIX])
def test_the_report_is_what_the_steps_read(mixture):
    class Twelve:
        domains: ClassVar = {"a": range(5), "b": range(5, 12)}
        row_tokens = 16

        def __len__(self):
            return 12

    numbers = np.concatenate([row_numbers(Twelve.domains, 4, (3,), s, mixture) for s in range(7)])
    a, b = drawn(Twelve(), 28, (3,), mixture)
    assert (a.rows, b.rows) == ((numbers < 5).sum(), (numbers >= 5).sum())
    assert (a.repeats, b.repeats) == (
        a.rows - len(set(numbers[numbers < 5])),
        b.rows - len(set(numbers[numbers >= 5])),
    )
    assert (a.tokens, a.epochs, a.share) == (16 * a.rows, a.rows / 5, a.rows / 28)
