import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer import quantize as quantize_module
from mptbook.infer.load import random_model, weight_bytes
from mptbook.infer.quantize import FEW, GROUP, SOME, PackedLinear, is_packed, pack, quantize, unpack
from mptbook.infer.slots import Slots
from mptbook.infer.widen import widened
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

V = 83
CONFIG = MPTConfig(d_model=128, n_heads=4, n_layers=3, max_seq_len=64, vocab_size=V, no_bias=False)


@functools.cache
def model():
    torch.manual_seed(5)
    found = MPT(CONFIG).eval()
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return found


def fresh():
    found = MPT(CONFIG)
    found.load_state_dict(model().state_dict())
    return found.eval()


def normal(n, width, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_by_hand_eight_bits():
    packed, scale = pack(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]), 8)
    assert packed.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.0]))


def test_by_hand_four_bits():
    weight = torch.zeros(1, GROUP)
    weight[0, 0], weight[0, 1], weight[0, 32], weight[0, 63] = 0.8, -0.1, 0.3, -0.75
    packed, scale = pack(weight, 4)
    torch.testing.assert_close(scale, torch.tensor([[-0.1]]))  # 0.8 becomes -8
    byte = packed[0, 0].tolist()
    assert byte[0] & 15 == 0  # -8 + 8
    assert byte[1] & 15 == 9  # 1 + 8
    assert byte[0] >> 4 == 5  # 0.3 is -3
    assert byte[31] >> 4 == 15  # -0.75 is 7.5, and 7 is the most


@given(
    seed=st.integers(0, 99), bits=st.sampled_from([8, 4]), size=st.sampled_from([1e-30, 1, 1e30])
)
@settings(max_examples=30, deadline=None)
def test_no_weight_moves_by_more_than_its_step(seed, bits, size):
    weight = normal(5, 2 * GROUP, seed) * size
    packed, scale = pack(weight, bits)
    step = (scale.abs() if bits == 4 else scale)[..., None].expand(-1, -1) if bits == 8 else scale
    step = step.abs().repeat_interleave(GROUP, 1) if bits == 4 else step.abs()
    moved = (unpack(packed, scale) - weight).abs()
    # Half a step; at 4 bits the far end of the other sign, which 7 has to hold, a whole one.
    assert bool((moved <= step * (0.501 if bits == 8 else 1.001)).all())


@pytest.mark.parametrize(
    ("bits", "least", "most"), [(16, 1e-3, 2.5e-3), (8, 5e-3, 9e-3), (4, 0.07, 0.11)]
)
def test_normal_weights_lose_what_so_many_bits_lose(bits, least, most):
    weight = normal(64, 256)
    error = (unpack(*pack(weight, bits)) - weight).norm() / weight.norm()
    assert least < error < most


def test_rows_taken_out_of_a_packed_weight_are_rows_of_the_weight():
    for bits in (16, 8, 4):
        packed, scale = pack(normal(9, GROUP), bits)
        some = unpack(packed[[7, 2]], None if scale is None else scale[[7, 2]])
        assert torch.equal(some, unpack(packed, scale)[[7, 2]])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_packed_model_computes_with_its_unpacked_weights(bits, monkeypatch):
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: False)  # exactly, anywhere
    rounded = fresh()
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if is_packed(name):
                weight.copy_(unpack(*pack(weight, bits)))
    packed = quantize(fresh(), bits)
    ids = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = rounded(ids)
        with monkeypatch.context() as patch:
            patch.setattr(PackedLinear, "_most_rows", lambda layer, in_bf16: 0)  # all are widened
            torch.testing.assert_close(packed(ids), expected, rtol=1e-4, atol=1e-4)
        # Loops of our own, with inputs rounded to 16 bits where weights have 8 or 4.
        torch.testing.assert_close(packed(ids), expected, rtol=1e-3, atol=2e-3)
    for rows in ([0, 1], [0]):
        slots = Slots(packed, 2, 20, "float32")
        for row in rows:
            slots.read(row, ids[row, :12].tolist())
        for at in range(12, 20):
            logits = slots.decode(rows, ids[rows, at].tolist())
            torch.testing.assert_close(logits, expected[rows, at], rtol=1e-3, atol=2e-3)


def test_products_in_bfloat16_are_as_near_as_its_eight_bits(monkeypatch):
    packed, ids = quantize(fresh(), 8), torch.arange(40).view(2, 20)
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: True)
    found = []
    for asked in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=asked):
            found.append(packed(ids).float())
    apart = (found[1] - found[0]).square().mean().sqrt() / found[0].std()
    assert 0 < apart < 0.02  # a step is 2 ** -8, twice rounded in each of nine products


def test_the_tied_embedding_is_packed_too_and_norms_are_not():
    packed = quantize(fresh(), 8)
    kept = {name.rpartition(".")[0].split(".")[-1] for name, _ in packed.named_parameters()}
    assert kept == {"norm_1", "norm_2", "norm_f", "Wqkv", "out_proj", "up_proj", "down_proj"}
    assert all(
        name.endswith((".bias", "norm_1.weight", "norm_2.weight", "norm_f.weight"))
        for name, _ in packed.named_parameters()
    )
    assert packed.transformer.wte.packed.dtype == torch.int8


def test_errors_are_reported_for_every_layer():
    seen = {}
    quantize(fresh(), 4, look=seen.__setitem__)
    assert set(seen) == {name for name, _ in model().named_parameters() if is_packed(name)}
    assert len(seen) == 4 * CONFIG.n_layers + 1
    assert all(0.05 < error < 0.15 for error in seen.values())


def test_rows_of_the_smallest_numbers_keep_their_sign():
    # The scale is 1.4 of the smallest number that there is, and rounded to 1.
    weight = torch.tensor([[178.0, -178.0, 3.0, 0.0]]) * 2.0**-149
    packed, scale = pack(weight, 8)
    assert scale.item() == 2.0**-149
    assert packed.tolist() == [[127, -127, 3, 0]]


def test_scales_keep_their_digits_whatever_the_model_is_cast_to():
    packed = quantize(fresh(), 8)
    before = packed.transformer.wte.scale.clone()
    packed.bfloat16()
    assert torch.equal(packed.transformer.wte.scale, before)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_random_model_takes_what_its_bits_say_and_writes(bits):
    config = CONFIG.replace(vocab_size=1000, no_bias=True)
    random = random_model(config, bits)
    numbers = sum(w.numel() for name, w in MPT(config).named_parameters() if is_packed(name))
    scales = {16: 0, 8: 1000 + 3 * 128 * 9, 4: numbers // GROUP}[bits]
    scales = {16: 0, 8: 4 * (1000 + 3 * (3 + 1 + 4 + 1) * 128), 4: 4 * numbers // GROUP}[bits]
    norms = 4 * 7 * 128
    assert weight_bytes(random) == numbers * bits // 8 + scales + norms
    logits = Slots(random, 1, 4).read(0, [1, 2, 3])
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_what_cannot_be_packed_is_refused_by_name():
    broken = fresh()
    broken.transformer.blocks[1].ffn.up_proj.weight.data[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.up_proj\.weight: a weight is infinite"):
        quantize(broken, 8)
    narrow = MPT(CONFIG.replace(d_model=96))
    with pytest.raises(ValueError, match=r"96 inputs are no multiple of 64.*take 8 bits"):
        quantize(narrow, 4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_compiled_loops_widen_is_the_weight_rounded_once(bits, dtype):
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, bits)
    assert torch.equal(widened(*packed, dtype), unpack(*packed).to(dtype))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("units", [True, False])
def test_a_packed_layer_is_the_same_function_of_few_rows_and_of_many(bits, units, monkeypatch):
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: units)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(70, 128, generator=generator), torch.randn(70, generator=generator)
    layer = PackedLinear(*pack(weight, bits), bias)
    given, few = torch.randn(2, SOME + 1, 128, generator=generator), FEW[layer.packed.dtype]
    # Who gives float32 gets products as exact as that, whatever units there are.
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 5e-3)):
        x = given.to(dtype)
        exact = x.double() @ layer.weight.double().T + bias.double()
        for rows, expected in ((x[:1, :few], exact[:1, :few]), (x, exact), (x[0, 3], exact[0, 3])):
            found = layer(rows)
            assert (found.shape, found.dtype) == (expected.shape, dtype)
            assert found.is_contiguous()
            assert (found - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("norm", ["layernorm", "low_precision_layernorm", "rmsnorm"])
@pytest.mark.parametrize("n_tokens", [3, max(FEW.values()) + 8])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_packed_model_of_any_norm_reads_under_autocast(bits, n_tokens, norm):
    torch.manual_seed(5)
    packed = quantize(MPT(CONFIG.replace(norm_type=norm)).eval(), bits)
    ids = torch.arange(n_tokens)[None]
    with torch.no_grad():
        exact = packed(ids)
        with torch.autocast("cpu", torch.bfloat16):
            found = packed(ids)
    assert found.dtype == torch.bfloat16
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.02


def test_without_units_for_bfloat16_rows_of_8_bits_are_the_same_in_any_company(monkeypatch):
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    layer = PackedLinear(*pack(torch.randn(7, 131, generator=generator), 8), None)
    x = torch.randn(2 * SOME + 5, 131, generator=generator)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_gradients_reach_what_is_before_a_packed_layer():
    layer = PackedLinear(*pack(torch.randn(7, 128), 8), None)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.weight.sum(0).expand_as(x)
    assert (x.grad - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize(("bits", "units"), [(16, True), (8, True), (4, True), (16, False)])
def test_no_more_of_a_layer_is_widened_at_once_than_is_said(bits, units, monkeypatch):
    monkeypatch.setattr(quantize_module, "has_bf16", lambda device: units)
    monkeypatch.setattr(quantize_module, "WIDE", 10 * 128)
    sizes = []
    for name in ("unpack", "widened"):
        widen = getattr(quantize_module, name)

        def noted(packed, scale, dtype, widen=widen):
            found = widen(packed, scale, dtype)
            sizes.append(found.numel())
            return found

        monkeypatch.setattr(quantize_module, name, noted)
    x = torch.randn(SOME + 1, 128, dtype=torch.bfloat16 if units else torch.float32)
    PackedLinear(*pack(torch.randn(35, 128), bits), None)(x)
    as_stored = bits == 16 and units
    assert sizes == ([] if as_stored else [1280, 1280, 1280, 640])
