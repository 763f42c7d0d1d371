import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook import plan
from mptbook.model.config import NAMED, NORMS, MPTConfig
from mptbook.model.mpt import MPT


def built(config):
    """Parameter counts of the model itself, which on this device is only described."""
    with torch.device("meta"):
        return {name: p.numel() for name, p in MPT(config).named_parameters()}


def part_of(name):
    if "norm" in name or "_ln" in name:
        return "norms"
    words = {"wte": "embedding", "wpe": "positions", "attn": "attention", "ffn": "mlp"}
    return next((part for word, part in words.items() if f".{word}." in name), "head")


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_those_of_the_model_that_is_built(name):
    config = MPTConfig.named(name)
    assert plan.parameters(config)["total"] == sum(built(config).values())


@st.composite
def odd_configs(draw):
    kv_heads = draw(st.integers(1, 3))
    n_heads = kv_heads * draw(st.integers(1, 3))
    kinds = {1: "multiquery_attention", n_heads: "multihead_attention"}
    kind = kinds.get(kv_heads, "grouped_query_attention")
    return MPTConfig(
        d_model=n_heads * draw(st.sampled_from([2, 5, 8])),
        n_heads=n_heads,
        n_layers=draw(st.integers(1, 3)),
        expansion_ratio=draw(st.sampled_from([1, 2.5, 4])),
        max_seq_len=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(2, 99)),
        no_bias=draw(st.booleans()),
        norm_type=draw(st.sampled_from(NORMS)),
        tie_word_embeddings=draw(st.booleans()),
    ).replace(
        attn_type=kind,
        kv_n_heads=kv_heads if kind == "grouped_query_attention" else None,
        qk_ln=draw(st.booleans()),
        alibi=draw(st.booleans()),
    )


@settings(deadline=None)
@given(odd_configs())
def test_every_part_is_exact_whatever_the_configuration(config):
    expected = dict.fromkeys(plan.parameters(config), 0)
    for name, count in built(config).items():
        expected[part_of(name)] += count
        expected["total"] += count
    assert plan.parameters(config) == expected


def test_flops_grow_with_the_row_only_by_attention():
    config = MPTConfig.named("mpt-7b")
    more = plan.flops_per_token(config, 2049) - plan.flops_per_token(config, 2048)
    assert more == 12 * 32 * 4096


def test_cache_of_mpt_7b_is_half_a_mebibyte_a_token():
    # 32 layers, a key and a value, 32 heads of 128 numbers, two bytes each
    assert plan.cache_bytes_per_token(MPTConfig.named("mpt-7b")) == 2**19


def test_a_single_key_head_divides_the_cache_by_the_heads():
    many = MPTConfig.named("mpt-7b")
    one = many.replace(attn_type="multiquery_attention")
    assert plan.cache_bytes_per_token(many) == 32 * plan.cache_bytes_per_token(one)


def test_weights_are_rounded_up_to_whole_bytes():
    config = MPTConfig(d_model=3, n_heads=1, n_layers=1, vocab_size=7, expansion_ratio=1)
    assert plan.parameters(config)["total"] == 7 * 3 + 4 * 9 + 2 * 9 + 3 * 3  # 84
    assert plan.weight_bytes(config, bits=16) == 168
    assert plan.weight_bytes(config, bits=4.5) == 48  # 47.25


def test_days_undo_mfu():
    config = MPTConfig.named("mpt-30b")
    share = plan.mfu(config, 900, 2048, 312e12)
    assert plan.days(config, 900 * 86_400 * 5, 2048, 5, share * 312e12) == pytest.approx(1)


def test_lion_keeps_a_quarter_less_than_adamw():
    assert plan.training_bytes_per_parameter("lion") == 12
    assert plan.training_bytes_per_parameter("adamw") == 16


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'sgd'; it must be one of lion, adamw"):
        plan.training_bytes_per_parameter("sgd")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("h100-80", "H100-80GB"),
        ("A100-40gb", "A100-40GB"),
        ("t4", "T4"),
        ("H200-141", "H200-141GB"),
    ],
)
def test_a_gpu_may_be_named_in_any_case_and_without_gb(name, meant):
    assert plan.gpu_named(name) == meant


@pytest.mark.parametrize(
    ("name", "hint"), [("h100", "; did you mean H100-80GB?"), ("tpu", ""), ("a100-60", "A100-")]
)
def test_an_unknown_gpu_is_refused_with_the_nearest(name, hint):
    with pytest.raises(
        ValueError, match=f"gpu is {name!r}; it must be one of T4, .*{hint}"
    ) as info:
        plan.gpu_named(name)
    assert bool(hint) == ("did you mean" in str(info.value))
