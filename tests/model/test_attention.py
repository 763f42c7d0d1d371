import math

import pytest
import torch

from mptbook.model import attention, horizon, products, windows
from mptbook.model.alibi import alibi_slopes
from mptbook.model.attention import Attention, auto, backend, choose, slopes_of
from mptbook.model.config import BACKENDS, MPTConfig
from mptbook.model.reference import eager, reference

NAMES = ("sdpa", "products", "horizon", "auto")
FORMS = [eager, *(pytest.param(backend(name), id=name) for name in NAMES)]
ALL = [reference, *FORMS, pytest.param(backend("flex"), id="flex")]
DROPPING = [reference, eager, pytest.param(backend("sdpa"), id="sdpa")]
B, H, K = 2, 6, 10
WINDOWS = torch.tensor([1, 2, 5, 16, 17, 40])


@pytest.fixture(autouse=True)
def _what_serves_long_rows_serves_short_ones_too(monkeypatch):
    monkeypatch.setattr(horizon, "HORIZON_TOKENS", 1)
    for module in (windows, products):
        monkeypatch.setattr(module, "BLOCK_QUERIES", 5)  # the last of 17 queries in a block of 2


def inputs(n_queries, n_keys, dtype=torch.float32, kv_heads=H):
    torch.manual_seed(0)
    q = torch.randn(B, H, n_queries, K)
    k, v = torch.randn(2, B, kv_heads, n_keys, K)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def output_and_gradients(form, qkv, **how):
    torch.manual_seed(1)
    out = form(*qkv, alibi_slopes(H), scale=K**-0.5, **how)
    return [out, *torch.autograd.grad(out, qkv, torch.randn(out.shape).to(out.dtype))]


def in_documents(n_keys):
    return torch.tensor([[0] * 5 + [1] * (n_keys - 5), [3] * (n_keys - 1) + [0]])


def coming_again(n_keys):
    return torch.tensor([[0] * 5 + [1] * 7 + [0] * (n_keys - 12), ([3, 7, 3, 9] * n_keys)[:n_keys]])


def cases(function, kv_heads=(6, 2, 1)):
    marks = [
        pytest.mark.parametrize("n_queries", [17, 4, 1]),
        pytest.mark.parametrize("kv_heads", kv_heads),
        pytest.mark.parametrize("near", [None, WINDOWS], ids=["far", "windows"]),
        pytest.mark.parametrize(
            "documents",
            [None, in_documents(17), coming_again(17)],
            ids=["whole", "documents", "again"],
        ),
    ]
    for mark in marks:
        function = mark(function)
    return function


def grouped_cases(function):
    return cases(function, kv_heads=[2])


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


def test_the_reference_looks_where_head_window_and_document_allow():
    q, k, _ = inputs(4, 17, kv_heads=2)
    v = torch.eye(17).expand(B, 2, 17, 17)  # the output is then the weights
    k, q = (torch.nn.functional.pad(x, (0, 7)) for x in (k, q))
    how = {"documents": coming_again(17), "windows": WINDOWS}
    seen = reference(q, k, v, alibi_slopes(H), scale=0.3, **how) > 0
    for row in range(B):
        for head, window in enumerate(WINDOWS.tolist()):
            for query in range(13, 17):
                documents = coming_again(17)[row]
                allowed = [
                    j <= query and query - j < window and documents[j] == documents[query]
                    for j in range(17)
                ]
                assert seen[row, head, query - 13].tolist() == [bool(x) for x in allowed]


@cases
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference_in_float32(form, documents, near, kv_heads, n_queries):
    qkv, how = inputs(n_queries, 17, kv_heads=kv_heads), {"documents": documents, "windows": near}
    expected = output_and_gradients(reference, qkv, **how)
    actual = output_and_gradients(form, qkv, **how)
    # Sums of float32 in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@grouped_cases
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_near_the_reference_in_bfloat16(form, documents, near, kv_heads, n_queries):
    qkv = inputs(n_queries, 17, torch.bfloat16, kv_heads)
    how = {"documents": documents, "windows": near}
    expected = output_and_gradients(reference, qkv, **how)
    actual = output_and_gradients(form, qkv, **how)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # Scores, weights and their gradients pass through numbers of 8 bits. A gradient that
        # cancels to zero, as the one token in view has, is compared with one of size 1.
        assert (one - other).norm() <= 3 * 2**-8 * max(other.norm(), 1)


@grouped_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_equals_the_reference_forward(dtype, documents, near, kv_heads, n_queries):
    qkv = [x.detach() for x in inputs(n_queries, 17, dtype, kv_heads)]
    how = {"documents": documents, "windows": near, "scale": 0.3}
    expected = reference(*qkv, alibi_slopes(H), **how)
    actual = backend("flex")(*qkv, alibi_slopes(H), **how)
    # Sums of float32 in another order; in bfloat16 also scores and weights of 8 bits.
    bound = 1e-5 if dtype == torch.float32 else 3 * 2**-8
    assert actual.dtype == dtype
    assert (actual - expected).norm() < bound * expected.norm()


def test_flex_refuses_a_backward_pass_on_a_cpu():
    with pytest.raises(ValueError, match=r"flex has no backward pass on a CPU; choose auto"):
        backend("flex")(*inputs(4, 17), alibi_slopes(H), scale=0.3)


@pytest.mark.parametrize("name", ["sdpa", "products"])
def test_the_folded_bias_holds_beyond_256_positions_in_bfloat16(name):
    qkv = inputs(601, 601, torch.bfloat16)
    expected = reference(*qkv, alibi_slopes(H), scale=0.3)
    actual = backend(name)(*qkv, alibi_slopes(H), scale=0.3)
    # A bias of plain bfloat16 positions misses by a third here.
    late = slice(300, None)
    error = (actual - expected)[:, :, late].norm() / expected[:, :, late].norm()
    assert error < 3 * 2**-8


@pytest.mark.parametrize("form", ALL)
def test_documents_are_attended_to_one_by_one(form):
    q, k, v = (x.detach() for x in inputs(17, 17))
    packed = form(q, k, v, alibi_slopes(H), scale=0.3, documents=in_documents(17))
    for row, start, end in ((0, 0, 5), (0, 5, 17), (1, 0, 16), (1, 16, 17)):
        part = [x[row : row + 1, :, start:end] for x in (q, k, v)]
        alone = form(*part, alibi_slopes(H), scale=0.3)
        torch.testing.assert_close(packed[row : row + 1, :, start:end], alone)


def refusals():
    q, k, v = (x.detach() for x in inputs(4, 17))
    slopes = alibi_slopes(H)
    bad = slopes.clone()
    bad[2] = math.nan
    yield "4 queries but only 3 keys; pass the cached keys", (q, k[:, :, :3], v[:, :, :3], slopes)
    yield "do not fit together; .* must divide", (q, k[:, :4], v[:, :4], slopes)
    yield r"values \(2, 6, 16, 10\) do not fit", (q, k, v[:, :, 1:], slopes)
    yield r"keys \(2, 6, 17, 9\) .* do not fit", (q, k[..., 1:], v[..., 1:], slopes)
    yield r"keys \(1, 6, 17, 10\) .* do not fit", (q, k[:1], v[:1], slopes)
    yield "nan.*needs 6 finite numbers, such as alibi_slopes", (q, k, v, bad)
    yield "slopes are .* needs 6 finite numbers", (q, k, v, slopes[:5])
    whole = (q, k, v, slopes)
    mask = torch.ones(2, 4, 17, dtype=torch.long)
    yield r"documents have the shape \(2, 4, 17\), .*takes no other mask", whole, mask
    yield r"2 rows of 17 keys; .* a document of their own", whole, in_documents(16)
    yield r"windows are \[1\]; 6 heads need 6, at least 1", whole, None, WINDOWS[:1]
    yield r"windows are \[0, 1, .* at least 1", whole, None, WINDOWS - 1


@pytest.mark.parametrize("case", list(refusals()), ids=lambda case: case[0])
@pytest.mark.parametrize("form", ALL)
def test_what_no_form_can_compute_is_refused(form, case):
    text, tensors, documents, near = [*case, None, None][:4]
    with pytest.raises(ValueError, match=text):
        form(*tensors, scale=0.3, documents=documents, windows=near)


@pytest.mark.parametrize("form", [*DROPPING, auto])
def test_dropout_drops_weights_and_keeps_their_mean(form):
    q, k, _ = inputs(17, 17)
    v = torch.ones(B, H, 17, K)
    torch.manual_seed(0)
    out = form(q, k, v, alibi_slopes(H), scale=0.3, dropout=0.3)
    assert not torch.allclose(out, v)
    assert out.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["products", "horizon", "flex"])
def test_forms_without_dropout_refuse_it(name):
    with pytest.raises(ValueError, match=rf"attn_pdrop is 0.3, and {name} cannot .* sdpa"):
        backend(name)(*inputs(4, 17), alibi_slopes(H), scale=0.3, dropout=0.3)


@pytest.mark.parametrize(
    ("expected", "n_queries", "n_keys", "dtype", "dropout"),
    [
        ("products", 17, 17, torch.float32, 0.0),
        ("products", 2, 1024, torch.bfloat16, 0.0),
        ("horizon", 2, 1025, torch.float32, 0.0),
        ("horizon", 17, 1025, torch.bfloat16, 0.0),
        ("horizon", 17, 17, torch.float16, 0.0),
        ("sdpa", 1, 17, torch.bfloat16, 0.3),
        ("sdpa", 1, 17, torch.float32, 0.0),
        ("sdpa", 1, 257, torch.bfloat16, 0.0),
        ("sdpa", 17, 17, torch.float32, 0.3),
        ("sdpa", 17, 17, torch.float64, 0.0),
        ("sdpa", 17, 257, torch.bfloat16, 0.3),
    ],
)
def test_the_form_follows_from_length_dtype_and_dropout(
    monkeypatch, expected, n_queries, n_keys, dtype, dropout
):
    q, k, v = inputs(n_queries, n_keys, dtype)
    assert choose(q, k, dropout) == expected
    taken = []
    monkeypatch.setattr(attention, "backend", lambda name: taken.append(name) or backend(name))
    auto(q, k, v, alibi_slopes(H), scale=0.3, dropout=dropout)
    assert taken == [expected]


def test_a_compiled_graph_takes_sdpa(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    q, k, _ = inputs(17, 17, torch.bfloat16)
    assert choose(q, k) == "sdpa"


def test_a_model_may_name_every_form_that_needs_no_package():
    for name in set(BACKENDS) - {"flash"}:
        config = MPTConfig(d_model=H * K, n_heads=H).replace(attn_impl=name)
        assert Attention(config, layer=0).backend is backend(name)


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


@pytest.mark.parametrize("n_queries", [17, 4, 1])
@pytest.mark.parametrize("near", [None, WINDOWS], ids=["far", "windows"])
def test_float64_is_computed_by_sdpa_and_refused_by_horizon(near, n_queries):
    qkv = inputs(n_queries, 17, torch.float64)
    expected = reference(*qkv, alibi_slopes(H), scale=0.3, windows=near)  # in float32
    actual = auto(*qkv, alibi_slopes(H), scale=0.3, windows=near)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"no kernel for torch.float64; .* choose sdpa"):
        backend("horizon")(*qkv, alibi_slopes(H), scale=0.3, windows=near)
