import math

import pytest
import torch

from mptbook.model.alibi import alibi_slopes
from mptbook.model.attention import Attention, auto, eager, reference, sdpa, slopes_of
from mptbook.model.config import MPTConfig

FORMS = [sdpa, eager, auto]
B, H, K = 2, 6, 10


def inputs(n_queries, n_keys, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(B, H, n_queries, K)
    k, v = torch.randn(2, B, H, n_keys, K)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def output_and_gradients(form, qkv, **how):
    torch.manual_seed(1)
    out = form(*qkv, alibi_slopes(H), scale=K**-0.5, **how)
    return [out, *torch.autograd.grad(out, qkv, torch.randn(out.shape).to(out.dtype))]


def in_documents(n_keys):
    return torch.tensor([[0] * 5 + [1] * (n_keys - 5), [3] * (n_keys - 1) + [0]])


def test_the_reference_is_the_formula():
    q, k, v = inputs(3, 5)
    slopes = alibi_slopes(H)
    out = reference(q, k, v, slopes, scale=0.3)
    head, query = 4, 1  # stands on key 3, so it sees keys 0 to 3
    scores = [
        0.3 * (q[1, head, query] @ k[1, head, key]).item() - float(slopes[head]) * (3 - key)
        for key in range(4)
    ]
    total = sum(math.exp(score) for score in scores)
    expected = sum(math.exp(s) / total * v[1, head, key] for key, s in enumerate(scores))
    torch.testing.assert_close(out[1, head, query], expected)


@pytest.mark.parametrize("documents", [None, in_documents(17)], ids=["whole", "documents"])
@pytest.mark.parametrize("n_queries", [17, 4, 1])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference_in_float32(form, n_queries, documents):
    qkv = inputs(n_queries, 17)
    expected = output_and_gradients(reference, qkv, documents=documents)
    actual = output_and_gradients(form, qkv, documents=documents)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [None, in_documents(17)], ids=["whole", "documents"])
@pytest.mark.parametrize("n_queries", [17, 4, 1])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_near_the_reference_in_bfloat16(form, n_queries, documents):
    qkv = inputs(n_queries, 17, torch.bfloat16)
    expected = output_and_gradients(reference, qkv, documents=documents)
    actual = output_and_gradients(form, qkv, documents=documents)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # Scores, weights and their gradients pass through numbers of 8 bits.
        assert (one - other).norm() < 3 * 2**-8 * other.norm()


def test_the_folded_bias_holds_beyond_256_positions_in_bfloat16():
    qkv = inputs(601, 601, torch.bfloat16)
    expected = reference(*qkv, alibi_slopes(H), scale=0.3)
    actual = sdpa(*qkv, alibi_slopes(H), scale=0.3)
    # A bias of plain bfloat16 positions misses by a third here.
    late = slice(300, None)
    error = (actual - expected)[:, :, late].norm() / expected[:, :, late].norm()
    assert error < 3 * 2**-8


def test_long_rows_are_not_given_to_the_eager_form():
    qkv = inputs(601, 601, torch.bfloat16)
    assert torch.equal(
        auto(*qkv, alibi_slopes(H), scale=0.3), sdpa(*qkv, alibi_slopes(H), scale=0.3)
    )


@pytest.mark.parametrize("form", [reference, *FORMS])
def test_documents_are_attended_to_one_by_one(form):
    q, k, v = inputs(17, 17)
    packed = form(q, k, v, alibi_slopes(H), scale=0.3, documents=in_documents(17))
    for row, start, end in ((0, 0, 5), (0, 5, 17), (1, 0, 16), (1, 16, 17)):
        part = [x[row : row + 1, :, start:end] for x in (q, k, v)]
        alone = form(*part, alibi_slopes(H), scale=0.3)
        torch.testing.assert_close(packed[row : row + 1, :, start:end], alone)


@pytest.mark.parametrize("form", [reference, *FORMS])
def test_more_queries_than_keys_is_refused(form):
    with pytest.raises(ValueError, match="4 queries but only 3 keys"):
        form(*inputs(4, 3), alibi_slopes(H), scale=0.3)


@pytest.mark.parametrize("form", [reference, *FORMS])
def test_dropout_drops_weights_and_keeps_their_mean(form):
    q, k, _ = inputs(17, 17)
    v = torch.ones(B, H, 17, K)
    torch.manual_seed(0)
    out = form(q, k, v, alibi_slopes(H), scale=0.3, dropout=0.3)
    assert not torch.allclose(out, v)
    assert out.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("qk_ln", [False, True])
@pytest.mark.parametrize(
    ("kind", "kv_heads"), [("multiquery_attention", 1), ("grouped_query_attention", 2)]
)
def test_shared_key_heads_equal_multihead_with_repeated_ones(kind, kv_heads, qk_ln):
    torch.manual_seed(0)
    config = MPTConfig(d_model=H * K, n_heads=H, no_bias=False)
    shared = Attention(config.replace(attn_type=kind, kv_n_heads=kv_heads), layer=0)
    torch.nn.init.normal_(shared.Wqkv.bias)
    whole = Attention(config, layer=0)
    whole.out_proj = shared.out_proj

    def repeated(rows):  # (kv_heads * K, ...) to (H * K, ...)
        heads = rows.unflatten(0, (kv_heads, K))
        return heads.repeat_interleave(H // kv_heads, dim=0).flatten(0, 1)

    for name in ("weight", "bias"):
        q, k, v = getattr(shared.Wqkv, name).data.split(shared.splits)
        getattr(whole.Wqkv, name).data = torch.cat([q, repeated(k), repeated(v)])
    if qk_ln:  # repeating every head equally often changes neither mean nor variance
        shared.q_ln = whole.q_ln = torch.nn.LayerNorm(H * K)
        shared.k_ln, whole.k_ln = torch.nn.LayerNorm(kv_heads * K), torch.nn.LayerNorm(H * K)
    x = torch.randn(B, 17, H * K)
    slopes = slopes_of(config)
    torch.testing.assert_close(shared(x, slopes), whole(x, slopes))


def test_a_model_without_alibi_has_slopes_of_zero():
    config = MPTConfig(d_model=60, n_heads=6).replace(alibi=False)
    assert slopes_of(config).tolist() == [0] * 6


def test_the_largest_bias_sets_the_flattest_slope():
    config = MPTConfig(d_model=64, n_heads=8).replace(alibi_bias_max=16)
    assert slopes_of(config).tolist() == [2.0**-h for h in range(2, 17, 2)]


def test_a_configuration_may_name_every_backend_there_is():
    from mptbook.model import attention, config

    assert set(attention.BACKENDS) == set(config.BACKENDS)
