import numba
import numpy as np
import pytest
import torch

from mptbook.infer import kernels
from mptbook.infer.decode import _linear
from mptbook.infer.quantize import PackedLinear, pack


@numba.njit
def multiplied(linear, x):
    return kernels.product(linear, x)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("outputs", [1, 7, 66])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_any_number_of_rows_are_those_of_numpy(bits, outputs, biased):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, 128, generator=generator)
    layer = torch.nn.Linear(128, outputs, bias=biased)
    layer.weight.data = weight
    if bits != 32:
        layer = PackedLinear(*pack(weight, bits), layer.bias)
    expected_weight = layer.weight.detach().double().numpy()
    bias = layer.bias.detach().double().numpy() if biased else 0
    for rows in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(rows, 128, generator=generator).numpy()
        found = multiplied(_linear(layer), x)
        expected = x.astype(np.float64) @ expected_weight.T + bias
        # 16-bit steps of the inputs where one row meets 4 bits; else float32's own.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_a_row_becomes_does_not_depend_on_how_many_others_there_are(bits):
    weight = torch.randn(33, 192, generator=torch.Generator().manual_seed(3))
    linear = _linear(PackedLinear(*pack(weight, bits), None))
    x = np.random.default_rng(0).standard_normal((9, 192)).astype(np.float32)
    whole = multiplied(linear, x)
    for rows in (2, 3, 4, 7, 8):
        np.testing.assert_array_equal(multiplied(linear, x[:rows]), whole[:rows])
