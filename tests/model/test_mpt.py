import math

import pytest
import torch
import torch.nn.functional as F

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

SHAPE = MPTConfig(d_model=42, n_heads=6, n_layers=2, vocab_size=101, max_seq_len=23)


def build(config=SHAPE, seed=0):
    """A model with weights that are nowhere trivial, biases and norms included."""
    torch.manual_seed(seed)
    model = MPT(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "_ln" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


def tokens(*shape, seed=1):
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


def slopes_by_hand(n_heads, bias_max):
    def series(n):
        return [2.0 ** (-bias_max * (h + 1) / n) for h in range(n)]

    below = 2 ** (n_heads.bit_length() - 1)
    return (series(below) + series(2 * below)[0::2])[:n_heads]


def by_hand(model, ids):
    """The logits of one row (T,), computed head by head from the state dict in float64."""
    c, attn = model.config, model.config.attn_config
    w = {name: weight.double() for name, weight in model.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        if "rms" not in c.norm_type:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def attention(x, name):
        qkv = linear(x, f"{name}.Wqkv")
        if attn.clip_qkv is not None:
            qkv = qkv.clamp(-attn.clip_qkv, attn.clip_qkv)
        width, groups = c.d_model // c.n_heads, c.kv_heads
        q, k, v = qkv.split([c.d_model, groups * width, groups * width], dim=1)
        if attn.qk_ln:
            q, k = norm(q, f"{name}.q_ln"), norm(k, f"{name}.k_ln")
        slopes = slopes_by_hand(c.n_heads, attn.alibi_bias_max) if attn.alibi else [0] * c.n_heads
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        heads = []
        for h in range(c.n_heads):
            g = h // (c.n_heads // groups)
            mine, its = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
            scores = q[:, mine] @ k[:, its].T * (attn.softmax_scale or 1 / math.sqrt(width))
            scores = (scores - slopes[h] * distance).masked_fill(distance < 0, -math.inf)
            heads.append(scores.softmax(-1) @ v[:, its])
        return linear(torch.cat(heads, dim=1), f"{name}.out_proj")

    x = w["transformer.wte.weight"][ids]
    if not attn.alibi and c.learned_pos_emb:
        x = x + w["transformer.wpe.weight"][: len(ids)]
    for i in range(c.n_layers):
        block = f"transformer.blocks.{i}"
        x = x + attention(norm(x, f"{block}.norm_1"), f"{block}.attn")
        up = linear(norm(x, f"{block}.norm_2"), f"{block}.ffn.up_proj")
        gelu = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + linear(gelu, f"{block}.ffn.down_proj")
    head = w["transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"]
    factor = 1 if c.logit_scale is None else c.logit_scale
    return (
        norm(x, "transformer.norm_f")
        @ head.T
        * (1 / math.sqrt(c.d_model) if factor == "inv_sqrt_d_model" else factor)
    )


FIELDS = {
    "as mpt": {},
    "biases": {"no_bias": False},
    "qk_ln": {"qk_ln": True},
    "qk_ln with biases": {"qk_ln": True, "no_bias": False},
    "clip_qkv": {"clip_qkv": 0.5},
    "softmax_scale": {"softmax_scale": 0.9},
    "alibi_bias_max": {"alibi_bias_max": 16},
    "neither positions nor alibi": {"alibi": False, "learned_pos_emb": False},
    "learned positions": {"alibi": False},
    "expansion_ratio": {"expansion_ratio": 1.5},
    "logit_scale": {"logit_scale": 0.3},
    "inv_sqrt_d_model": {"logit_scale": "inv_sqrt_d_model"},
    "norm_eps": {"norm_eps": 0.1},
    "rmsnorm": {"norm_type": "rmsnorm"},
    "untied head": {"tie_word_embeddings": False},
    "multiquery": {"attn_type": "multiquery_attention"},
    "grouped": {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "one head": {"n_heads": 1},
}


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_logits_are_those_computed_by_hand(changes):
    model = build(SHAPE.replace(**changes))
    ids = tokens(2, 17)
    for row, logits in zip(ids, model(ids), strict=True):
        expected = by_hand(model, row)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "as mpt"])
def test_every_field_changes_the_logits(name):
    ids = tokens(2, 17)
    logits = build(SHAPE.replace(**FIELDS[name]))(ids)
    assert (logits - build()(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["layernorm", "low_precision_layernorm"])
def test_norm_type_decides_the_precision_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        hidden = build(SHAPE.replace(norm_type=name)).hidden(tokens(2, 17))
    assert hidden.dtype == (torch.bfloat16 if name.startswith("low") else torch.float32)


@pytest.mark.parametrize("name", ["emb_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_acts_in_training_alone(name):
    model, plain = build(SHAPE.replace(**{name: 0.3})), build()
    ids = tokens(2, 17)
    assert torch.equal(model(ids), plain(ids))
    model.train()
    assert not torch.allclose(model(ids), plain(ids))
    assert not torch.allclose(model(ids), model(ids))


@pytest.mark.parametrize("changes", [{}, {"alibi": False}], ids=["alibi", "learned positions"])
def test_packed_documents_equal_separate_ones(changes):
    model = build(SHAPE.replace(**changes))
    row = tokens(1, 22)
    documents = torch.tensor([[4] * 9 + [0] * 1 + [7] * 12])
    packed = model(row, documents)
    for start, end in ((0, 9), (9, 10), (10, 22)):
        alone = model(row[:, start:end])
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_a_later_token_never_changes_an_earlier_logit(changes):
    model = build(SHAPE.replace(**changes))
    ids = tokens(1, 17)
    other = ids.clone()
    other[0, 11:] = (other[0, 11:] + 1) % 101
    torch.testing.assert_close(model(other)[:, :11], model(ids)[:, :11], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(other)[:, 11:], model(ids)[:, 11:])


class Kept:
    """The simplest cache that there can be."""

    def __init__(self):
        self.layers = {}
        self.n_tokens = 0

    def __len__(self):
        return self.n_tokens

    def extend(self, layer, k, v):
        old = self.layers.get(layer)
        both = (
            (k, v)
            if old is None
            else [torch.cat(pair, 2) for pair in zip(old, (k, v), strict=True)]
        )
        self.layers[layer] = both
        return [both]


@pytest.mark.parametrize("changes", FIELDS.values(), ids=FIELDS)
def test_tokens_in_pieces_equal_tokens_at_once(changes):
    model = build(SHAPE.replace(**changes))
    ids, documents = tokens(2, 17), torch.tensor([[0] * 17, [0] * 7 + [1] * 10])
    cache, pieces = Kept(), []
    for start, end in ((0, 8), (8, 9), (9, 15), (15, 17)):
        pieces.append(model(ids[:, start:end], documents[:, :end], cache))
        cache.n_tokens = end
    whole = model(ids, documents)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_sum_of_what_each_target_costs():
    model = build()
    ids, targets = tokens(2, 9), tokens(2, 9, seed=2)
    targets[0, :3] = -100
    targets[1, 8] = -100
    logits = model(ids)
    expected = 0.0
    for row in range(2):
        for t in range(9):
            if targets[row, t] != -100:
                expected -= F.log_softmax(logits[row, t], dim=0)[targets[row, t]].item()
    assert model.loss(ids, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"alibi": False, "attn_pdrop": 0.2, "resid_pdrop": 0.2}])
def test_recomputing_gives_the_same_gradients(changes):
    model = build(SHAPE.replace(**changes)).train()
    ids = tokens(2, 17)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(3)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_recomputing_runs_each_block_twice():
    model = build().train()
    model.recompute = True
    calls = []
    model.transformer.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    model.loss(tokens(1, 5), tokens(1, 5)).backward()
    assert len(calls) == 2


def test_recomputing_never_fills_a_cache_twice():
    model = build()
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        cache = Kept()
        model(tokens(1, 5), cache=cache).square().sum().backward()
        assert cache.layers[1][0].shape[2] == 5
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_every_weight_gets_a_gradient():
    changes = {"no_bias": False, "qk_ln": True, "tie_word_embeddings": False, "alibi": False}
    model = build(SHAPE.replace(**changes))
    model.loss(tokens(2, 17), tokens(2, 17, seed=2)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_alibi_reads_past_the_length_it_was_trained_for():
    model = build()
    ids = tokens(1, 31)
    torch.testing.assert_close(model(ids)[0].double(), by_hand(model, ids[0]), rtol=1e-4, atol=1e-4)


def test_learned_positions_end_where_they_end():
    model = build(SHAPE.replace(alibi=False))
    with pytest.raises(ValueError, match="24 tokens, but learned positions end at max_seq_len=23"):
        model(tokens(1, 24))


def test_learned_positions_allow_a_long_row_of_short_documents():
    model = build(SHAPE.replace(alibi=False))
    row = tokens(1, 40)
    documents = torch.tensor([[0] * 20 + [1] * 20])
    torch.testing.assert_close(
        model(row, documents)[:, 20:], model(row[:, 20:]), rtol=1e-5, atol=1e-5
    )


def test_ids_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"ids have the shape \(7,\); the model reads \(batch, tok"
    ):
        build()(tokens(7))


@pytest.mark.parametrize("move", ["bfloat16", "half", "double"])
def test_slopes_stay_in_float32_whatever_the_weights_are(move):
    model = build(SHAPE.replace(n_heads=7, alibi_bias_max=8))
    slopes = model.slopes.clone()
    getattr(model, move)()
    assert model.slopes.dtype == torch.float32
    assert torch.equal(model.slopes, slopes)


def test_slopes_survive_a_model_that_was_only_described():
    with torch.device("meta"):
        model = MPT(SHAPE)
    model.to("meta").to_empty(device="cpu")
    torch.testing.assert_close(model.slopes, torch.tensor(slopes_by_hand(6, 8)))


def test_the_state_dict_holds_weights_alone():
    state = build().state_dict()
    assert not [name for name in state if not name.endswith(".weight")]
    assert "lm_head.weight" not in state


def test_a_row_without_tokens_has_no_logits():
    config = MPTConfig(d_model=60, n_heads=6, n_layers=1, vocab_size=97)
    assert MPT(config)(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 97)
