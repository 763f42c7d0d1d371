import pytest
import torch

from mptbook.model.attention import Attention
from mptbook.model.config import MPTConfig
from mptbook.model.horizon import normed_lengths, projected_bounds, static_bounds, static_ranges
from mptbook.model.norms import Norm

H, K, D = 6, 10, 60
GROUPED = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
CHANGES = {
    "plain": {},
    "biases": {"no_bias": False},
    "grouped": GROUPED,
    "multiquery": {"attn_type": "multiquery_attention"},
    "multiquery with biases": {"attn_type": "multiquery_attention", "no_bias": False},
    "clipped": {"clip_qkv": 0.7},
    "clipped where it hardly matters": {"clip_qkv": 50.0},
    "normed": {"qk_ln": True},
    "normed, with biases, grouped": {"qk_ln": True, "no_bias": False} | GROUPED,
    "normed and clipped": {"qk_ln": True, "clip_qkv": 0.7},
    "scaled": {"softmax_scale": 0.9},
}


def layer(changes, kind="layernorm", seed=0):
    """Attention and the norm before it, every parameter random."""
    torch.manual_seed(seed)
    config = MPTConfig(d_model=D, n_heads=H).replace(norm_type=kind, **changes)
    attention = Attention(config, layer=0)
    norm = Norm(kind, D, config.norm_eps, not config.no_bias)
    with torch.no_grad():
        for parameter in [*attention.parameters(), *norm.parameters()]:
            torch.nn.init.normal_(parameter, std=0.3)
    return attention, norm


@torch.no_grad()
def scores(attention, norm, x):
    """(H, T, T) float64: scale * q . k of all pairs in (T, D) of the residual stream."""
    seen = []

    def capture(q, k, v, slopes, **how):
        seen.extend((q.double(), k.double(), how["scale"]))
        return q

    attention.backend = capture
    attention(norm(x[None]), torch.zeros(H))
    q, k, scale = seen
    return scale * (q @ k.repeat_interleave(H // k.shape[1], dim=1).mT)[0]


def streams():
    """(n, D): ordinary, tiny, huge and one-sided vectors of a residual stream."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, D, generator=generator)
    one = torch.eye(D)
    return torch.cat([x, 1e-4 * x, 1e4 * x, x + 1e3, 100 * one, -100 * one, torch.zeros(1, D)])


@torch.no_grad()
def attack(attention, norm):
    """(2 H, D): for each head the two inputs of greatest score if norm and layer were linear."""
    heads_k = attention.kv_heads
    weight = attention.Wqkv.weight.double() * norm.weight.double()
    q, k, _ = weight.split(attention.splits)
    q = q.unflatten(0, (H, K))
    k = k.unflatten(0, (heads_k, K)).repeat_interleave(H // heads_k, dim=0)
    product = q.mT @ k  # (H, D, D)
    if not norm.rms:  # a LayerNorm lets no mean through
        centre = torch.eye(D).double() - 1 / D
        product = centre @ product @ centre
    left, _, right = torch.linalg.svd(product)
    return (100 * torch.cat([left[:, :, 0], right[:, 0]])).float()


def climb(attention, norm, x, head, steps=60):
    """(2, D): two inputs whose score by a head was climbed to by gradient ascent."""
    pair = x.clone().requires_grad_()
    backend, kept = attention.backend, []
    attention.backend = lambda q, k, v, slopes, **how: kept.append((q, k)) or q
    for _ in range(steps):
        kept.clear()
        attention(norm(pair[None]), torch.zeros(H))
        (q, k), group = kept[0], head // (H // attention.kv_heads)
        score = q[0, head, 0] @ k[0, group, 1]
        (grad,) = torch.autograd.grad(score, pair)
        pair = (pair + 0.3 * grad / grad.norm(dim=1, keepdim=True).clamp(min=1e-12)).detach()
        pair.requires_grad_()
    attention.backend = backend
    return pair.detach()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("name", CHANGES)
def test_no_text_scores_above_the_bound(name, kind):
    attention, norm = layer(CHANGES[name], kind)
    bounds = static_bounds(attention, norm)
    assert bounds.shape == (H,)
    assert bounds.dtype == torch.float64
    x = torch.cat([streams(), attack(attention, norm)])
    x = torch.cat([x, *(climb(attention, norm, x[h : h + 2], h) for h in range(H))])
    reached = scores(attention, norm, x).abs().amax((1, 2))
    assert (reached <= bounds).all()
    assert torch.equal(static_ranges(attention, norm), 2 * bounds)


@pytest.mark.parametrize("changes", [{}, GROUPED, {"softmax_scale": 0.9}])
def test_without_a_bias_the_bound_is_reached_but_for_its_allowance_for_rounding(changes):
    attention, norm = layer(changes, "rmsnorm")
    reached = scores(attention, norm, attack(attention, norm)).abs().amax((1, 2))
    # (1 + 2 ** -7) ** 4 is 1.03; scores here are of float32.
    expected = static_bounds(attention, norm)
    torch.testing.assert_close(reached * (1 + 2**-7) ** 4, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("changes", [{"no_bias": False}, {"qk_ln": True}])
def test_the_other_bounds_are_no_more_than_some_times_what_is_reached(changes):
    attention, norm = layer(changes, "layernorm")
    x = streams()
    x = torch.cat([x, *(climb(attention, norm, x[h : h + 2], h) for h in range(H))])
    reached = scores(attention, norm, x).abs().amax((1, 2))
    # Lengths are multiplied and not directions, and a gain counts as its largest.
    assert (static_bounds(attention, norm) < 12 * reached).all()


@pytest.mark.parametrize("changes", [{}, {"attn_type": "multiquery_attention"}])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_bound_allows_for_what_bfloat16_rounds_up(kind, changes):
    attention, norm = layer(changes, kind)
    attention, norm = attention.bfloat16(), norm.bfloat16()
    x = torch.cat([streams(), attack(attention, norm)]).bfloat16()
    reached = scores(attention, norm, x).abs().amax((1, 2))
    assert (reached <= static_bounds(attention, norm)).all()


@pytest.mark.parametrize("source", ["norm", "layer"])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_scores_that_come_from_biases_alone_are_bounded_too(source, kv_heads):
    attention, norm = layer(
        {"no_bias": False, "attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}
    )
    with torch.no_grad():
        norm.weight.fill_(0.0)
        (attention.Wqkv if source == "norm" else norm).bias.fill_(0.0)
    x = streams()
    reached = scores(attention, norm, x).abs().amax((1, 2))
    bounds = static_bounds(attention, norm)
    assert (reached <= bounds).all()
    assert (reached > 0.05 * bounds).any()  # random directions of 10 numbers are seldom parallel


def test_clipping_bounds_a_score_where_the_weights_allow_more():
    attention, norm = layer({"clip_qkv": 0.3})
    allowance = (1 + 2**-7) ** 4
    expected = torch.full((H,), K**-0.5 * K * 0.3**2 * allowance, dtype=torch.float64)
    torch.testing.assert_close(static_bounds(attention, norm), expected)
    loose, _ = layer({"clip_qkv": 50.0})
    plain, _ = layer({})
    assert torch.equal(static_bounds(loose, norm), static_bounds(plain, norm))


def test_clipped_queries_and_keys_can_score_as_much_as_their_bound():
    attention, norm = layer({"clip_qkv": 0.3}, "rmsnorm")
    allowance = (1 + 2**-7) ** 4
    with torch.no_grad():  # one direction of the stream turns every number up
        attention.Wqkv.weight.fill_(1.0)
        norm.weight.fill_(1.0)
    reached = scores(attention, norm, torch.ones(1, D)).amax((1, 2))
    expected = static_bounds(attention, norm)
    torch.testing.assert_close(reached * allowance, expected, rtol=1e-6, atol=0)  # float32


def test_the_spectral_norm_is_that_of_the_whole_product():
    attention, norm = layer(GROUPED, "rmsnorm")
    weight = attention.Wqkv.weight.double() * norm.weight.double()
    q, k, _ = weight.split(attention.splits)
    for head in range(H):
        group = head // 3
        product = q[10 * head : 10 * head + 10].T @ k[10 * group : 10 * group + 10]
        expected = D * torch.linalg.matrix_norm(product, 2)
        torch.testing.assert_close(projected_bounds(attention, norm)[head], expected)


def test_what_a_norm_puts_out_is_nearly_as_long_as_its_bound():
    norm = Norm("layernorm", D, bias=True)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 1, D))
        norm.bias.fill_(0.5)
    lengths = normed_lengths(norm, H)
    x = torch.cat([torch.eye(D), -torch.eye(D)]).double()  # all of the length in one channel
    reached = norm.double()(x).unflatten(1, (H, K)).norm(dim=2).amax(0)
    assert (reached <= lengths).all()
    assert (reached > 0.6 * lengths).all()  # the bias, spread over all channels, adds less
