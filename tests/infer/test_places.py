from typing import NamedTuple

import numpy as np
import pytest
from numba import njit

from mptbook.infer.places import layer_at, places_of


class Inner(NamedTuple):
    whole: np.ndarray
    part: np.ndarray


class Outer(NamedTuple):
    first: np.ndarray
    inner: Inner
    last: np.ndarray


def layer(seed):
    chance = np.random.default_rng(seed)
    inner = Inner(chance.integers(-9, 9, (3, 2, 5)).astype(np.int8), np.empty((0, 0), np.float32))
    return Outer(chance.random((4, 3), np.float32), inner, chance.integers(0, 9, 7))


@njit
def sums(first, places, number):
    one = layer_at(first, places, number)
    one.last[2] += 1
    return one.first.sum(), one.inner.whole[1, 1].sum(), one.inner.part.size, one.last.sum()


@pytest.mark.parametrize("number", [0, 1, 4])
def test_each_layer_is_read_and_written_where_it_lies(number):
    layers = [layer(seed) for seed in range(5)]
    before = [each.last.copy() for each in layers]
    found = sums(layers[0], places_of(layers), number)
    one = layers[number]
    assert found[0] == pytest.approx(float(one.first.sum()), rel=1e-6)
    assert found[1:] == (one.inner.whole[1, 1].sum(), 0, one.last.sum())
    changed = [int((each.last - was).sum()) for each, was in zip(layers, before, strict=True)]
    assert changed == [int(n == number) for n in range(5)]
