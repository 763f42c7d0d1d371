from itertools import product

import numba
import numpy as np
import pytest
import torch

from mptbook.infer import kernels
from mptbook.infer.linear import linear_of
from mptbook.infer.quantize import PackedLinear, pack


@numba.njit
def multiplied(linear, x):
    return kernels.product(linear, x)


def layer_of(weight, bits, bias=None):
    if bits == 32:
        layer = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
        layer.weight.data, layer.bias = weight, bias
        return layer
    return PackedLinear(*pack(weight, bits), bias)


@pytest.mark.parametrize(("bits", "inputs"), [(4, 128), *product([32, 16, 8], [1, 31, 128, 163])])
@pytest.mark.parametrize("outputs", [1, 7, 66])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_any_number_of_rows_are_those_of_numpy(bits, outputs, inputs, biased):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.nn.Parameter(torch.randn(outputs, generator=generator)) if biased else None
    layer = layer_of(weight, bits, bias)
    expected_weight = layer.weight.detach().double().numpy()
    added = bias.detach().double().numpy() if biased else 0
    for rows in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(rows, inputs, generator=generator).numpy()
        found = multiplied(linear_of(layer), x)
        expected = x.astype(np.float64) @ expected_weight.T + added
        steps = np.abs(x).max(1, keepdims=True) / 32767 if bits <= 8 else 0
        half_a_step = steps / 2 * np.abs(expected_weight).sum(1)
        assert (np.abs(found - expected) <= half_a_step + 2e-5).all()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_what_a_row_becomes_does_not_depend_on_how_many_others_there_are(bits):
    inputs = 192 if bits == 4 else 203
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(33, inputs, generator=generator)
    bias = torch.nn.Parameter(torch.randn(33, generator=generator))
    linear = linear_of(layer_of(weight, bits, bias))
    x = np.random.default_rng(0).standard_normal((9, inputs)).astype(np.float32)
    whole = multiplied(linear, x)
    for rows in range(1, 9):
        np.testing.assert_array_equal(multiplied(linear, x[:rows]), whole[:rows])
        np.testing.assert_array_equal(multiplied(linear, x[9 - rows :]), whole[9 - rows :])


def test_no_sum_of_whole_numbers_runs_over():
    weight = torch.ones(5, 9000)  # each becomes 127, each input 32,767
    weight[1] = -1
    x = np.full((5, 9000), 3, np.float32)
    found = multiplied(linear_of(layer_of(weight, 8)), x)
    np.testing.assert_allclose(found, x @ weight.numpy().T, rtol=1e-6)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_in_its_row(bits, value):
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    x = np.ones((4, 128), np.float32)
    x[2, 70] = value
    found = multiplied(linear_of(layer_of(weight, bits)), x)
    assert not np.isfinite(found[2]).any()
    assert np.isfinite(found[[0, 1, 3]]).all()
