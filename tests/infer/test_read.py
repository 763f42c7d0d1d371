import pytest
import torch

from mptbook.infer.emit import BF16_UNITS
from mptbook.infer.quantize import quantize
from mptbook.infer.slots import Slots
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.model.precision import autocast, has_bf16
from tests.infer.test_slots import SHAPES, V, some_ids

UNITS = BF16_UNITS and has_bf16(torch.device("cpu"))


def packed(shape, bits=16):
    torch.manual_seed(2)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=3, max_seq_len=128, vocab_size=V)
    found = MPT(config.replace(**SHAPES[shape]))
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return quantize(found, bits)


@pytest.mark.skipif(not UNITS, reason="a processor with units for bfloat16")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_no_further_from_float32_than_autocast(shape, bits):
    model, ids = packed(shape, bits), some_ids(1, 120)
    with torch.no_grad():
        exact = model(ids)[0]
        with autocast(model.device):
            trained = model(ids)[0].float()
    found = Slots(model, 1, 120).read(0, ids[0].tolist(), every=True)
    apart, most = ((each - exact).square().mean().sqrt() for each in (found, trained))
    assert 1e-5 < apart < 1.1 * most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_last_token_is_the_same_if_every_one_is_asked_for(dtype):
    model, ids = packed("grouped keys"), some_ids(1, 50)[0].tolist()
    slots = Slots(model, 2, 50, dtype)
    last, every = slots.read(0, ids), slots.read(1, ids, every=True)
    rounding = 1e-5 if dtype == "float32" or not UNITS else 0.02
    torch.testing.assert_close(last, every[-1], rtol=0, atol=rounding * every.abs().max().item())
    assert torch.equal(slots.keys[:, 0], slots.keys[:, 1])


@pytest.mark.parametrize("wrong", [-1, V])
def test_an_id_that_is_none_of_the_models_is_refused(wrong):
    slots = Slots(packed("plain"), 1, 9)
    with pytest.raises(ValueError, match=f"id {wrong}; the model has those from 0 to {V - 1}"):
        slots.read(0, [1, wrong, 2])
    assert slots.lengths == [0]
