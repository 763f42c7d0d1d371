import pytest
import torch
import torch.nn.functional as F

from mptbook.model import loss
from mptbook.model.loss import linear_cross_entropy

N, D, V = 11, 6, 13


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(loss, "ROWS", 4)  # the last part has 3


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    targets[[2, 9]] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, factor):
    return F.cross_entropy(factor * F.linear(hidden, weight), targets, reduction="sum")


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_loss_and_gradients_are_those_of_cross_entropy(factor):
    hidden, weight, targets = inputs(torch.float64)
    ours = linear_cross_entropy(hidden, weight, targets, factor)
    theirs = plain(hidden, weight, targets, factor)
    torch.testing.assert_close(ours, theirs)
    grads, others = (torch.autograd.grad(3 * x, (hidden, weight)) for x in (ours, theirs))
    torch.testing.assert_close(grads, others)


def test_under_autocast_the_products_are_rounded_and_the_sums_are_not():
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets)
    low = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight)]
    logits = F.linear(*low)
    rounded = logits + (logits.bfloat16().float() - logits).detach()  # as a product gives them
    exact = F.cross_entropy(rounded, targets, reduction="sum")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)
    assert ours.dtype == torch.float32
    grads = torch.autograd.grad(ours, (hidden, weight))
    assert {grad.dtype for grad in grads} == {torch.float32}
    for grad, other in zip(grads, torch.autograd.grad(exact, low), strict=True):
        assert (grad - other).norm() < 2**-8 * other.norm()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_asked_for_are_made(wanted):
    hidden, weight, targets = inputs()
    for leaf, needed in zip((hidden, weight), wanted, strict=True):
        leaf.requires_grad_(needed)
    value = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(value, plain(hidden, weight, targets, 1.0))
    assert value.requires_grad == any(wanted)
    if any(wanted):
        value.backward()
        assert (hidden.grad is not None, weight.grad is not None) == wanted


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, weight, targets = inputs()
    for wrong in (V, -1):
        targets[0] = wrong
        with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
            linear_cross_entropy(hidden, weight, targets)


def test_rows_without_a_target_cost_nothing_and_have_no_gradient():
    hidden, weight, targets = inputs()
    value = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    value.backward()
    assert value == 0
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0
