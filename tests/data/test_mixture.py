import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptbook.data.mixture import Mixture

MPT_7B = {
    "mc4": 0.33, "c4": 0.299, "cc": 0.10, "stack": 0.10, "wiki": 0.04,
    "markdown": 0.035, "s2orc": 0.033, "books": 0.03, "arxiv": 0.019, "exchange": 0.014,
}  # fmt: skip


def test_the_mix_of_mpt_7b_is_exact_in_every_thousand_rows():
    mixture = Mixture(MPT_7B)
    assert mixture.window == 1000
    assert mixture.counts == (330, 299, 100, 100, 40, 35, 33, 30, 19, 14)
    for window in range(3):
        sources, _ = mixture.draw(np.arange(1000) + 1000 * window, (17,))
        assert tuple(np.bincount(sources)) == mixture.counts


def test_weights_are_taken_by_their_decimals_and_need_no_sum():
    assert Mixture({"a": 0.1, "b": 0.2}).counts == (1, 2)
    assert Mixture({"a": 33.5, "b": 66.5}).window == 200
    assert Mixture({"a": 1, "b": 0, "c": 1}).names == ("a", "c")


def test_shares_that_need_a_longer_window_are_rounded():
    mixture = Mixture({"a": 0.123456789, "b": 0.876543211})
    assert (mixture.window, mixture.counts) == (10_000, (1235, 8765))


weights = st.dictionaries(
    st.sampled_from("abcdef"), st.integers(1, 40).map(lambda n: n / 10), min_size=1
)


@given(weights, st.integers(0, 99), st.integers(0, 3000), st.integers(1, 400))
def test_a_place_has_the_same_source_whoever_asks_and_counts_have_no_gap(chosen, seed, start, n):
    mixture = Mixture(chosen)
    places = np.arange(start, start + n)
    sources, before = mixture.draw(places, (seed,))
    for rank in range(3):
        mine = mixture.draw(places[rank::3], (seed,))
        assert (mine[0] == sources[rank::3]).all()
        assert (mine[1] == before[rank::3]).all()
    first, _ = mixture.draw(np.arange(start), (seed,))
    for source in np.unique(sources):
        counted = before[sources == source]
        assert (counted == (first == source).sum() + np.arange(len(counted))).all()


@given(weights, st.integers(0, 99), st.integers(1, 64))
def test_a_source_is_spread_evenly_over_its_window(chosen, seed, n):
    """The n first rows have n times its share of each, give or take one row and what the others
    are off by together."""
    mixture = Mixture(chosen)
    sources, _ = mixture.draw(np.arange(mixture.window), (seed,))
    stretch = sources[:n]
    for source, count in enumerate(mixture.counts):
        expected = count * len(stretch) / mixture.window
        off = abs((stretch == source).sum() - expected)
        assert off <= 1 + len(mixture.counts) * count / mixture.window


@given(weights, st.integers(0, 99), st.integers(1, 3000))
def test_counts_are_those_of_the_draws(chosen, seed, n):
    mixture = Mixture(chosen)
    sources, _ = mixture.draw(np.arange(n), (seed,))
    expected = np.bincount(sources, minlength=len(mixture.names))
    assert (mixture.count(n, (seed,)) == expected).all()


def test_seeds_differ():
    mixture = Mixture({"a": 1, "b": 1.5})
    draws = [mixture.draw(np.arange(200), (seed,))[0] for seed in range(2)]
    assert (draws[0] != draws[1]).any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": 1, "b": -0.1}, "the weight of b is -0.1; take a finite number >= 0"),
        ({"a": float("nan")}, "the weight of a is nan"),
        ({"a": 0, "b": 0.0}, r"no source of \['a', 'b'\] has a weight above 0"),
        ({}, "no source of"),
        ({"a": 1, "b": 1e-7}, "the weight of b is 1e-07 of all, less than one row in 10,000"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Mixture(bad)
