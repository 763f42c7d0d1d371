import pytest
import torch

from mptbook.bench.attention import (
    FORMS,
    SCALE,
    TRANSFORMERS,
    errors,
    forward,
    forward_backward,
    random_qkv,
    without_alibi,
)
from mptbook.bench.attention import H as HEADS
from mptbook.model.alibi import alibi_slopes
from mptbook.model.reference import reference


def expected(form, qkv):
    slopes = torch.zeros(HEADS) if form is without_alibi else alibi_slopes(HEADS)
    return reference(*qkv.float(), slopes, scale=SCALE)


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_compute_the_same_in_float32(name):
    qkv = random_qkv(2, 33, torch.float32)
    # Sums of float32 in another order.
    torch.testing.assert_close(
        forward(FORMS[name], qkv), expected(FORMS[name], qkv), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_are_near_in_bfloat16(name):
    qkv = random_qkv(2, 33)
    out, exact = forward(FORMS[name], qkv), expected(FORMS[name], qkv)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 3 * 2**-8 * exact.norm()  # numbers of 8 bits


@pytest.mark.parametrize("name", FORMS)
def test_all_forms_have_the_same_gradients(name):
    qkv = random_qkv(2, 33, torch.float32)
    both = []
    for form in (FORMS[name], lambda *qkv: expected(FORMS[name], torch.stack(qkv))):
        kept = []

        def keeping(q, k, v, form=form, kept=kept):
            kept.extend((q, k, v))
            return form(q, k, v)

        forward_backward(keeping, qkv)
        both.append([x.grad for x in kept])
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_the_table_of_errors_has_every_form_and_no_error_is_nothing():
    found = errors(tokens=33)
    assert found.keys() == FORMS.keys()
    assert TRANSFORMERS in found
    # The rounding of bfloat16 and no more: some steps of 2 ** -9.
    assert all(2**-11 < error < 3 * 2**-8 for error in found.values())


def test_inputs_are_the_same_each_time_and_differ_among_q_k_and_v():
    qkv = random_qkv(2, 33)
    assert torch.equal(qkv, random_qkv(2, 33))
    assert not torch.equal(qkv[0], qkv[1])
    assert qkv.shape == (3, 2, HEADS, 33, 64)
