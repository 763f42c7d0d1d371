import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptbook.model.config import NAMED, NORMS, AttentionConfig, InitConfig, MPTConfig
from mptbook.model.mpt import MPT

# mosaicml/mpt-7b's config.json, as released.
RELEASED = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
SMALL = {"d_model": 42, "n_heads": 6, "n_layers": 3, "vocab_size": 101}


def on_meta(config):
    with torch.device("meta"):
        return MPT(config)


@pytest.mark.parametrize(
    ("name", "n_parameters", "n_tensors"),
    [
        ("mpt-125m", 123_685_632, 74),
        ("mpt-1b", 1_311_344_640, 146),
        ("mpt-7b", 6_649_286_656, 194),
        ("mpt-7b-8k", 6_649_286_656, 194),
        ("mpt-7b-storywriter", 6_649_286_656, 194),
        ("mpt-30b", 29_957_200_896, 290),
    ],
)
def test_named_models_have_the_released_number_of_parameters(name, n_parameters, n_tensors):
    model = on_meta(MPTConfig.named(name))
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert len(model.state_dict()) == n_tensors


def test_the_30b_has_64_heads_of_112():
    config = MPTConfig.named("mpt-30b")
    assert (config.n_heads, config.head_width, config.max_seq_len) == (64, 112, 8192)


def test_storywriter_differs_from_the_7b_in_length_slopes_and_clipping_alone():
    story = MPTConfig.named("mpt-7b-storywriter")
    assert story == MPTConfig.named("mpt-7b").replace(
        max_seq_len=65_536, alibi_bias_max=16, clip_qkv=6
    )


def test_the_tensors_of_a_block_have_the_released_names_and_shapes():
    block = {
        name.removeprefix("transformer.blocks.31."): tuple(weight.shape)
        for name, weight in on_meta(MPTConfig.named("mpt-7b")).state_dict().items()
        if name.startswith("transformer.blocks.31.")
    }
    assert block == {
        "norm_1.weight": (4096,),
        "attn.Wqkv.weight": (12288, 4096),
        "attn.out_proj.weight": (4096, 4096),
        "norm_2.weight": (4096,),
        "ffn.up_proj.weight": (16384, 4096),
        "ffn.down_proj.weight": (4096, 16384),
    }


def test_the_released_file_of_the_7b_is_the_named_7b():
    assert MPTConfig.from_hf(RELEASED) == MPTConfig.named("mpt-7b")


def test_what_llm_foundry_leaves_out_has_its_defaults():
    config = MPTConfig.from_hf({"model_type": "mpt", "d_model": 42, "n_heads": 6})
    assert (config.no_bias, config.vocab_size, config.attn_config.alibi) == (False, 50_368, False)


def test_what_transformers_leaves_out_has_its_defaults():
    config = MPTConfig.from_hf({"layer_norm_epsilon": 1e-6, "attn_config": {"model_type": ""}})
    assert (config.no_bias, config.vocab_size, config.attn_config.alibi) == (True, 50_368, True)
    assert config.norm_eps == 1e-6


def test_a_rotary_field_is_harmless_where_there_is_no_rotation():
    config = MPTConfig.from_hf({"attn_config": {"rope": False, "rope_theta": 10_000}})
    assert config == MPTConfig.from_hf({})


configs = st.builds(
    MPTConfig,
    d_model=st.sampled_from([24, 48]),
    n_heads=st.sampled_from([1, 6, 12]),
    n_layers=st.integers(1, 5),
    expansion_ratio=st.sampled_from([1, 2.5, 4]),
    max_seq_len=st.integers(1, 99),
    vocab_size=st.integers(1, 60_000),
    emb_pdrop=st.floats(0, 0.9),
    resid_pdrop=st.floats(0, 0.9),
    learned_pos_emb=st.booleans(),
    no_bias=st.booleans(),
    norm_type=st.sampled_from(NORMS),
    norm_eps=st.sampled_from([1e-5, 1e-6]),
    logit_scale=st.sampled_from([None, "inv_sqrt_d_model", 0.5, 2]),
    tie_word_embeddings=st.booleans(),
    attn_config=st.builds(
        AttentionConfig,
        attn_type=st.sampled_from(["multihead_attention", "multiquery_attention"]),
        attn_pdrop=st.sampled_from([0, 0.0, 0.1]),
        qk_ln=st.booleans(),
        clip_qkv=st.sampled_from([None, 6, 0.5]),
        softmax_scale=st.sampled_from([None, 0.3]),
        attn_uses_sequence_id=st.booleans(),
        alibi=st.booleans(),
        alibi_bias_max=st.sampled_from([8, 8.0, 16, 4.5]),
    )
    | st.just(AttentionConfig(attn_type="grouped_query_attention", kv_n_heads=1)),
    init_config=st.builds(
        InitConfig,
        name=st.sampled_from(["kaiming_normal_", "baseline_"]),
        emb_init_std=st.none() | st.floats(0, 1),
        init_div_is_residual=st.booleans() | st.floats(1, 9),
    ),
)


@given(configs)
def test_a_configuration_survives_its_file(config):
    assert MPTConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_replace_reaches_into_attention_and_initialisation():
    config = MPTConfig(**SMALL).replace(n_layers=7, qk_ln=True, init_div_is_residual=30)
    assert config.init_config.init_div_is_residual == 30
    assert (config.n_layers, config.attn_config.qk_ln, config.attn_config.alibi) == (7, True, True)


@pytest.mark.parametrize(
    ("released", "message"),
    [
        ({"d_modle": 8}, "d_modle is not a field of an MPT configuration; did you mean d_model?"),
        ({"zzz": 8}, "zzz is not a field of an MPT configuration$"),
        ({"attn_config": {"alibi_biasmax": 8}}, "did you mean alibi_bias_max?"),
        ({"init_config": {"init_stdd": 8}}, "did you mean init_std?"),
        ({"model_type": "gpt2"}, "model_type is gpt2; only mpt can be read"),
        ({"embedding_fraction": 0.5}, "embedding_fraction=0.5 is not supported"),
        ({"attn_config": {"prefix_lm": True}}, "prefix_lm=True is not supported"),
        ({"attn_config": {"rope": True}}, "rope=True is not supported; MPT models have False"),
        ({"attn_config": {"nope": True}}, "nope=True"),
        ({"attn_config": {"qk_gn": True}}, "qk_gn=True"),
        ({"attn_config": {"sliding_window_size": 64}}, "sliding_window_size=64"),
        ({"attn_config": {"attn_logit_softcapping": 30.0}}, "attn_logit_softcapping=30.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"head_dim": 64}, "head_dim=64 is not supported; MPT models have None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"block_overrides": {"order": []}}, "block_overrides="),
        ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config=.*mptglu"),
        ({"fc_type": "te"}, "fc_type='te' is not supported; MPT models have torch"),
        ({"attn_config": {"kv_dim": 3}}, "kv_dim=3"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": 1.0}}}, "temperature_tuning="),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(released, message):
    with pytest.raises(ValueError, match=message):
        MPTConfig.from_hf(released)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be a whole number from 1 on"),
        ({"n_layers": -1}, "n_layers is -1; it must be a whole number from 1 on"),
        ({"d_model": 100, "n_heads": 12}, "d_model=100 .* n_heads=12; try d_model=96 or 108"),
        ({"d_model": 5, "n_heads": 12}, "try d_model=12$"),
        ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm'; it must be one of layernorm, "),
        ({"attn_type": "linear"}, "attn_type is 'linear'; it must be one of multihead_attention"),
        ({"attn_type": "grouped_query_attention"}, "needs kv_n_heads, a divisor of n_heads"),
        (
            {"attn_type": "grouped_query_attention", "kv_n_heads": 4},
            "kv_n_heads=4 does not divide n_heads=6",
        ),
        ({"kv_n_heads": 2}, "kv_n_heads=2 needs attn_type=grouped_query_attention"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0; it must be above 0, or left out"),
        ({"clip_qkv": 0}, "clip_qkv is 0; it must be above 0, or left out"),
        ({"alibi_bias_max": -8}, "alibi_bias_max is -8; it must be above 0, or left out"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be a whole number from 1 on"),
        ({"softmax_scale": -0.2}, "softmax_scale is -0.2; it must be above 0"),
        ({"attn_impl": "triton"}, "attn_impl is 'triton'; it must be one of auto, reference"),
        ({"logit_scale": "sqrt"}, "logit_scale is 'sqrt'; it must be a number or inv_sqrt_d_model"),
    ],
)
def test_a_contradiction_names_the_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        MPTConfig(**SMALL).replace(**changes)


def test_a_file_says_how_many_key_heads_there_are_only_where_they_are_fewer():
    assert "kv_n_heads" not in MPTConfig(**SMALL).to_hf()["attn_config"]
    fewer = MPTConfig(**SMALL).replace(attn_type="grouped_query_attention", kv_n_heads=2)
    assert fewer.to_hf()["attn_config"]["kv_n_heads"] == 2


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"mpt-7b-storywritr is not .* did you mean mpt-7b-story"):
        MPTConfig.named("mpt-7b-storywritr")


def test_the_tiny_model_is_a_named_one():
    assert "mpt-tiny" in NAMED
