"""How far low-precision norms are off, derived from the steps of bfloat16 and measured."""

import pytest
import torch

from mptbook.model.norms import Norm

kinds = pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
U = 2**-8  # the largest relative error of rounding to bfloat16


def by_hand(norm, x):
    """In float64; differentiable."""
    x = x.double()
    if not norm.rms:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def low_precision(kind, width, rows=64, mean=0.0):
    """A low-precision norm, an input of variance one, and the output under autocast."""
    torch.manual_seed(0)
    norm = Norm("low_precision_" + kind, width)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(rows, width) + mean
    with torch.autocast("cpu", torch.bfloat16):
        return norm, x, norm(x)


def error(found, exact):
    """Root mean square of the error over that of what is exact."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def rounding_noise(x):
    """Root mean square of the error of rounding x to bfloat16, over that of x.

    From the distance of neighbouring numbers only: an error that is uniform over that
    distance has a twelfth of its square as variance.
    """
    x = x.detach().double()
    step = 2.0 ** (torch.frexp(x).exponent - 1 - 7)
    return float((step.square().mean() / 12 / x.square().mean()).sqrt())


@kinds
def test_nothing_but_input_weight_and_output_is_rounded(kind):
    norm, x, y = low_precision(kind, 768)
    norm.weight.data = norm.weight.bfloat16().float()
    exact = by_hand(norm, x.bfloat16())
    # One rounding of the output; float32 inside, where numbers near zero lose 2 ** -24 of 1.
    torch.testing.assert_close(y.double(), exact, rtol=U, atol=2**-21)


@kinds
@pytest.mark.parametrize("width", [48, 768, 12_288])
def test_the_error_is_that_of_three_roundings_whatever_the_width(kind, width):
    norm, x, y = low_precision(kind, width, rows=786_432 // width)
    exact = by_hand(norm, x)
    parts = [rounding_noise(part) for part in (x, norm.weight, exact)]
    expected = sum(part**2 for part in parts) ** 0.5
    # The narrowest has 48 weights to average over: their rounding errors alone scatter by a
    # tenth. A third of the error comes from there.
    assert error(y, exact) == pytest.approx(expected, rel=0.1 if width == 48 else 0.03)


@pytest.mark.parametrize("mean", [0.0, 5.0, 1000.0])
def test_no_number_of_an_rmsnorm_is_off_by_more_than_four_roundings(mean):
    norm, x, y = low_precision("rmsnorm", 768, mean=mean)
    exact = by_hand(norm, x)
    # Input, weight and output by U each, and the root mean square by U as all inputs are.
    worst = (1 + U) ** 3 / (1 - U) - 1
    assert ((y.double() - exact).abs() <= worst * exact.abs()).all()


# Statistics


def summed_in_bfloat16(x):
    total = torch.zeros(x.shape[:-1], dtype=torch.bfloat16)
    for column in x.bfloat16().unbind(-1):
        total = total + column
    return total


@kinds
@pytest.mark.parametrize("width", [64, 256, 1024, 4096])
def test_a_sum_in_bfloat16_stops_at_256_and_the_norms_does_not(kind, width):
    x = torch.tensor([1.0, -1.0]).repeat(1, width // 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = Norm("low_precision_" + kind, width)(x)
    assert torch.equal(y.float(), x)
    total = summed_in_bfloat16(x.square())  # 256 + 1 is 256: a tie goes to the even number
    assert total == min(width, 256)
    too_large = (width / total.float()).sqrt()  # what dividing by its root would give
    assert too_large == max(1, width / 256) ** 0.5


def test_rounding_every_step_costs_more_than_rounding_at_the_ends():
    norm, x, y = low_precision("rmsnorm", 768)
    short, weight = x.bfloat16(), norm.weight.bfloat16()
    stepwise = short * torch.rsqrt(short.square().mean(-1, keepdim=True) + norm.eps) * weight
    exact = by_hand(norm, x)
    # Two roundings more of the same size, the product before the weight and the root mean
    # square of a row, make five in place of three.
    assert error(stepwise, exact) / error(y, exact) == pytest.approx((5 / 3) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.bfloat16, 16.0), (torch.float32, 4096.0)], ids=["bf16", "fp32"]
)
def test_variance_in_one_pass_is_lost_where_the_mean_takes_half_the_bits(dtype, mean):
    x = torch.tensor([1.0, -1.0]).repeat(1, 48).add(mean).to(dtype)  # exact in both
    one_pass = x.square().mean(-1) - x.mean(-1).square()
    assert one_pass == 0  # and not 1
    y = Norm("layernorm", 96)(x)
    torch.testing.assert_close(y.float(), x.float() - mean, rtol=2**-8, atol=0.0)


# A mean that is large beside the spread


@pytest.mark.parametrize("mean", [12.0, 24.0, 48.0, 96.0])
def test_a_layernorm_is_off_by_the_rounding_of_the_mean_over_the_spread(mean):
    norm, x, y = low_precision("layernorm", 768, mean=mean)
    exact = by_hand(norm, x)
    of_the_input = rounding_noise(x) * float(x.square().mean().sqrt())  # the spread is one
    rest = rounding_noise(norm.weight) ** 2 + rounding_noise(exact) ** 2
    expected = (of_the_input**2 + rest) ** 0.5
    # First order in an error that reaches a seventh: its square is left out.
    assert error(y, exact) == pytest.approx(expected, rel=0.03)


def test_twice_the_mean_is_twice_the_error_of_a_layernorm_and_no_more_for_an_rmsnorm():
    ratio = {}
    for kind in ("layernorm", "rmsnorm"):
        small, large = (low_precision(kind, 768, mean=mean) for mean in (24.0, 48.0))
        ratio[kind] = error(large[2], by_hand(*large[:2])) / error(small[2], by_hand(*small[:2]))
    assert ratio["layernorm"] == pytest.approx(2, rel=0.02)
    assert ratio["rmsnorm"] == pytest.approx(1, rel=0.1)


def test_in_float32_a_large_mean_costs_sixteen_bits_less():
    norm, x, y = low_precision("layernorm", 768, mean=96.0)
    exact = by_hand(norm, x)
    # The input is not rounded at all, only what is computed from it, a few times.
    assert error(norm(x), exact) < 2**-16 * 8 * error(y, exact)


def test_what_an_rmsnorm_says_of_the_differences_suffers_from_a_mean_as_much():
    _, x, _ = low_precision("rmsnorm", 768, mean=48.0)
    norm = Norm("low_precision_rmsnorm", 768).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x).double()
    exact = by_hand(norm, x)
    differences = exact - exact.mean(-1, keepdim=True)
    off = error(y - y.mean(-1, keepdim=True), differences)
    # The input's rounding as in a LayerNorm, and that of an output which is one almost all over.
    of_the_input, of_the_output = (
        rounding_noise(part) * float(part.square().mean().sqrt() / spread)
        for part, spread in ((x, 1.0), (exact, differences.square().mean().sqrt()))
    )
    assert off == pytest.approx((of_the_input**2 + of_the_output**2) ** 0.5, rel=0.1)


# Gradients


def gradients(norm, x, of_output, exact=False):
    inputs = x.double() if exact else x.clone()
    inputs.requires_grad_()
    norm.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = by_hand(norm, inputs) if exact else norm(inputs)
    y.backward(of_output.to(y.dtype))
    return inputs.grad, norm.weight.grad.clone()


@pytest.mark.parametrize("mean", [0.0, 24.0, 96.0])
def test_a_large_mean_spoils_the_weights_gradient_as_the_output_and_the_inputs_less(mean):
    norm, x, _ = low_precision("layernorm", 768, rows=256, mean=mean)
    of_output = torch.randn(x.shape)
    of_input, of_weight = gradients(norm, x, of_output)
    exact_input, exact_weight = gradients(norm, x, of_output, exact=True)
    noise = rounding_noise(x) * float(x.square().mean().sqrt())
    ends = (3 * rounding_noise(torch.randn(1000)) ** 2) ** 0.5
    # The normed input is a factor of the weight's gradient. In the input's it is a direction
    # that is taken out, one of 768, and the spread, which noise enlarges by half its square.
    assert error(of_weight, exact_weight) == pytest.approx((noise**2 + ends**2) ** 0.5, rel=0.2)
    assert error(of_input, exact_input) < ends + 2 * noise / 768**0.5 + noise**2


@kinds
def test_the_gradients_in_low_precision_are_those_of_float64_up_to_rounding(kind):
    norm, x, _ = low_precision(kind, 768, rows=512)
    of_output = torch.randn(x.shape)
    of_input, of_weight = gradients(norm, x, of_output)
    exact_input, exact_weight = gradients(norm, x, of_output, exact=True)
    # The output's gradient, the input or the weight, and the result itself are rounded.
    three = (3 * rounding_noise(torch.randn(1000)) ** 2) ** 0.5
    assert error(of_input, exact_input) < 1.3 * three
    assert error(of_weight, exact_weight) < 1.3 * three
