import re

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


# GPU, size, tokens per row, MFU in percent, tokens per second and GPU: the published table,
# llm-foundry's scripts/train/benchmarking/README.md.
PUBLISHED = """
H100 7b 2048 46.44 10643 | H100 7b 8192 37.14 6935 | H100 7b 32768 30.94 3318
H100 7b 65536 28.59 1956 | H100 7b 2048 45.71 10475 | H100 30b 2048 38.11 2002
H100 30b 8192 29.92 1384 | H100 30b 2048 40.27 2115 | H100 70b 2048 41.25 1007
H100 1b 2048 41.82 45455 | H100 1b 65536 26.34 5506 | A100 7b 2048 64.23 4641
A100 7b 8192 54.47 3206 | A100 7b 16384 51.96 2453 | A100 7b 65536 46.97 1013
A100 30b 2048 55.3 916 | A100 30b 8192 39.38 574 | A100 1b 2048 59.86 20513
A100 125m 2048 44.79 142830 | A100 7b 2048 50.14 3623 | A100 30b 2048 52.25 865
A100 70b 2048 48.91 376 | A100 13b 2048 51.93 1972 | A100 3b 2048 57.82 10065
"""
SHAPES = {
    "125m": (768, 12, 12),
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}


def benchmarked(size, row_tokens):
    """The models of the benchmark: learned positions and biases, unlike the released ones."""
    d_model, n_heads, n_layers = SHAPES[size]
    config = MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, no_bias=False)
    return config.replace(alibi=False, vocab_size=50_368, max_seq_len=row_tokens)


@pytest.mark.parametrize("row", re.findall(r"\w.*?(?=\s*[|\n])", PUBLISHED))
def test_mfu_is_the_published_one_to_the_digits_given(row):
    gpu, size, row_tokens, percent, throughput = row.split()
    config, peak = benchmarked(size, int(row_tokens)), plan.GPUS[f"{gpu}-80GB"].peak_flops
    # The table cuts the throughput to a whole number, so the truth lies below the next one.
    low, high = (
        100 * plan.mfu(config, int(throughput) + more, int(row_tokens), peak) for more in (0, 1)
    )
    assert low - 0.005 <= float(percent) <= high + 0.005


def test_totals_of_the_example_files_are_those_in_their_readme():
    expected = {"125m": 125_311_488, "1b": 1_315_950_592, "30b": 29_975_214_080}
    for size, total in expected.items():
        assert plan.parameters(benchmarked(size, 2048))["total"] == total


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
