import pytest
import torch
import torch.nn.functional as F

from mptbook.model.norms import Norm

D = 37
KINDS = ["layernorm", "rmsnorm"]


def norm_and_input(kind, bias=False):
    torch.manual_seed(0)
    norm = Norm(kind, D, eps=1e-3, bias=bias)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm, torch.randn(3, 5, D) * 4 + 1


def by_hand(norm, x):
    x = x.double()
    if not norm.rms:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


@pytest.mark.parametrize("low", ["", "low_precision_"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_autocast_both_precisions_are_the_formula(kind, low):
    norm, x = norm_and_input(low + kind)
    torch.testing.assert_close(norm(x).double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


def test_a_layernorm_may_have_a_bias():
    norm, x = norm_and_input("layernorm", bias=True)
    torch.testing.assert_close(norm(x).double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (D,), norm.weight, norm.bias, 1e-3))


def test_an_rmsnorm_has_no_bias_even_if_asked():
    assert Norm("rmsnorm", D, bias=True).bias is None


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_returns_the_dtype_of_autocast(kind):
    norm, x = norm_and_input("low_precision_" + kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    # Input, weight and result are each rounded to 8 bits.
    torch.testing.assert_close(y.double(), by_hand(norm, x), rtol=3 * 2**-8, atol=2**-6)


@pytest.mark.parametrize("kind", KINDS)
def test_full_precision_stays_in_float32_under_autocast(kind):
    norm, x = norm_and_input(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), by_hand(norm, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_low_precision_norm_get_float32_gradients(kind):
    norm, x = norm_and_input("low_precision_" + kind)
    with torch.autocast("cpu", torch.bfloat16):
        norm(x).float().square().sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    assert norm.weight.grad.isfinite().all()
    assert (norm.weight.grad != 0).all()


def test_scaling_the_input_leaves_an_rmsnorm_as_it_is():
    norm, x = norm_and_input("rmsnorm")
    norm.eps = 0.0
    torch.testing.assert_close(norm(7 * x), norm(x))


def test_shifting_the_input_leaves_a_layernorm_as_it_is():
    norm, x = norm_and_input("layernorm")
    torch.testing.assert_close(norm(x + 3), norm(x), rtol=1e-4, atol=1e-5)
