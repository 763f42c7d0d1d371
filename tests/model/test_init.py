import math

import pytest
import torch

from mptbook.model.config import InitConfig, MPTConfig
from mptbook.model.init import initialise
from mptbook.model.mpt import MPT

D, LAYERS = 252, 3
SHAPE = MPTConfig(d_model=D, n_heads=6, n_layers=LAYERS, vocab_size=997, no_bias=False)


def weights(config=SHAPE, **init):
    torch.manual_seed(0)
    return MPT(config.replace(init_config=InitConfig(**init))).state_dict()


def of_block(state, name):
    return state[f"transformer.blocks.1.{name}.weight"]


def assert_std(weight, expected):
    # The std of n normal numbers is off by 1 / sqrt(2 n); five times that.
    tolerance = 5 / math.sqrt(2 * weight.numel())
    assert weight.std().item() == pytest.approx(expected, rel=tolerance)
    assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel())


def test_kaiming_has_the_variance_of_two_over_the_fan_in():
    state = weights()
    for name in ("attn.Wqkv", "ffn.up_proj"):
        assert_std(of_block(state, name), math.sqrt(2 / D))
    assert_std(state["transformer.wte.weight"], math.sqrt(2 / D))


@pytest.mark.parametrize(
    ("divide", "divisor"), [(True, math.sqrt(2 * LAYERS)), (False, 1), (0, 1), (3.5, 3.5)]
)
def test_layers_that_write_the_residual_stream_are_divided(divide, divisor):
    state = weights(init_div_is_residual=divide)
    assert_std(of_block(state, "attn.out_proj"), math.sqrt(2 / D) / divisor)
    assert_std(of_block(state, "ffn.down_proj"), math.sqrt(2 / (4 * D)) / divisor)


def test_fan_out_looks_at_each_of_q_k_and_v():
    config = SHAPE.replace(attn_type="grouped_query_attention", kv_n_heads=2)
    q, k, v = of_block(weights(config, fan_mode="fan_out"), "attn.Wqkv").split([D, D // 3, D // 3])
    assert_std(q, math.sqrt(2 / D))
    assert_std(k, math.sqrt(2 / (D / 3)))
    assert_std(v, math.sqrt(2 / (D / 3)))


@pytest.mark.parametrize("name", ["xavier_normal_", "xavier_uniform_"])
def test_xavier_sees_three_layers_in_the_fused_matrix(name):
    for part in of_block(weights(name=name), "attn.Wqkv").chunk(3):
        assert_std(part, math.sqrt(2 / (D + D)))


def test_kaiming_uniform_has_the_same_variance_within_bounds():
    weight = of_block(weights(name="kaiming_uniform_"), "ffn.up_proj")
    assert_std(weight, math.sqrt(2 / D))
    assert weight.abs().max() <= math.sqrt(6 / D)


def test_neox_divides_by_its_own_rule():
    state = weights(name="neox_init_")
    std = math.sqrt(2 / (5 * D))
    assert_std(of_block(state, "ffn.up_proj"), std)
    assert_std(of_block(state, "ffn.down_proj"), std / (LAYERS / math.sqrt(10)))


def test_small_init_divides_by_the_common_rule():
    state = weights(name="small_init_")
    assert_std(of_block(state, "ffn.down_proj"), math.sqrt(2 / (5 * D)) / math.sqrt(2 * LAYERS))


def test_baseline_is_a_plain_normal():
    state = weights(name="baseline_", init_std=0.07, init_div_is_residual=False)
    for name in ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"):
        assert_std(of_block(state, name), 0.07)


def test_the_embedding_can_have_its_own_spread():
    assert_std(weights(emb_init_std=0.3)["transformer.wte.weight"], 0.3)
    uniform = weights(emb_init_uniform_lim=0.3)["transformer.wte.weight"]
    assert uniform.abs().max() <= 0.3
    assert_std(uniform, 0.3 / math.sqrt(3))


def test_biases_are_zero_and_norms_are_one():
    for name, weight in weights().items():
        if name.endswith("bias"):
            assert (weight == 0).all(), name
        elif "norm" in name:
            assert (weight == 1).all(), name


def test_a_model_that_was_only_described_is_filled_like_any_other():
    config = SHAPE.replace(qk_ln=True)
    with torch.device("meta"):
        late = MPT(config)
    late.to_empty(device="cpu")
    for parameter in late.parameters():
        parameter.data.fill_(float("nan"))
    whole = MPT(config)
    for model in (late, whole):
        torch.manual_seed(0)
        initialise(model, config)
    for name, weight in whole.state_dict().items():
        assert torch.equal(late.state_dict()[name], weight), name
    assert torch.equal(late.slopes, whole.slopes)


def test_the_first_loss_of_kaiming_is_a_nat_above_the_log_of_the_vocabulary():
    torch.manual_seed(0)
    model = MPT(MPTConfig(d_model=252, n_heads=6, n_layers=2, vocab_size=50_432))
    ids = torch.randint(50_432, (4, 61))
    with torch.no_grad():
        loss = model.loss(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    # ln(50432) = 10.83, and logits of variance 2 add half of it.
    assert loss.item() == pytest.approx(11.8, abs=0.1)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="init name is 'magic_'; it must be one of kaiming_norm"):
        weights(name="magic_")


def test_baseline_without_a_spread_is_refused():
    with pytest.raises(ValueError, match="baseline_ needs init_std"):
        weights(name="baseline_", init_std=None)
