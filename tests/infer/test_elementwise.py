import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mptbook.infer.elementwise import Norm, exponentials, gelu, normalise

EPS = np.finfo(np.float32).eps


def test_gelu_is_exact_to_float32_over_all_that_it_changes():
    x = np.linspace(-20, 20, 400_001, dtype=np.float32)
    found = x.copy()
    gelu(found)
    exact = F.gelu(torch.from_numpy(x).double()).numpy()
    assert np.all(np.abs(found - exact) <= 2.5 * EPS * np.maximum(1, np.abs(x)))
    theirs = F.gelu(torch.from_numpy(x)).numpy()
    assert np.abs(found - exact).max() < 2 * np.abs(theirs - exact).max()


def test_gelu_is_exact_relative_to_itself_far_below_zero():
    x = np.linspace(-10, 0, 100_001, dtype=np.float32)
    found, wide = x.copy(), torch.from_numpy(x).double()
    gelu(found)
    exact = (wide * torch.special.erfc(-wide * 0.5**0.5) / 2).numpy()
    np.testing.assert_allclose(found, exact, rtol=2**-16)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (1, 1024), (5, 411)])
def test_gelu_takes_every_element_of_every_row(shape):
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    found = x.copy()
    gelu(found)
    np.testing.assert_allclose(found, F.gelu(torch.from_numpy(x)), atol=1e-6)


def test_gelu_of_what_is_no_number_is_none():
    x = np.array([[np.nan, np.inf, 0.0, -1e30]], np.float32)
    gelu(x)
    assert np.isnan(x[0, 0])
    assert x[0, 1:].tolist() == [np.inf, 0.0, 0.0]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_norms_are_pytorchs(rms, biased):
    chance = np.random.default_rng(0)
    x, gain, bias = (chance.standard_normal(n, np.float32) for n in ((3, 17), 17, 17))
    found = np.empty_like(x)
    normalise(Norm(gain, bias if biased else np.empty(0, np.float32)), 1e-5, rms, x, found)
    theirs = F.rms_norm if rms else F.layer_norm
    expected = theirs(torch.from_numpy(x), (17,), torch.from_numpy(gain), eps=1e-5).numpy()
    np.testing.assert_allclose(found, expected + bias * biased, atol=2e-6)


def test_exponentials_are_exact_to_float32_and_come_with_their_sum():
    generator = np.random.default_rng(0)
    for size in (1, 7, 1000):
        x = (-90 * generator.random(size)).astype(np.float32) + np.float32(50)
        exact = np.exp(x.astype(np.float64) - 50)
        total = exponentials(x, np.float32(50))
        np.testing.assert_allclose(x, exact, atol=2**-22, rtol=0)
        np.testing.assert_allclose(x[exact > 1e-30], exact[exact > 1e-30], rtol=1e-5)
        np.testing.assert_allclose(total, exact.sum(), rtol=1e-6)


def test_the_exponential_of_what_is_no_number_is_none_and_of_far_below_is_nothing():
    x = np.array([0, -1e30, float("-inf"), float("nan")], np.float32)
    exponentials(x, np.float32(0))
    assert x[0] == 1
    assert (x[1:3] < 1e-37).all()
    assert np.isnan(x[3])
