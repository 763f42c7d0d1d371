"""Long rows: what takes minutes, run with `pytest -m slow`."""

import sys

import pytest
import torch

from mptbook.bench.measure import peak_memory
from mptbook.model.attention import Attention, slopes_of
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process"),
]


def layer_forward_and_backward(n_tokens):
    config = MPTConfig(d_model=512, n_heads=8)
    layer = Attention(config, layer=0)
    x = torch.randn(1, n_tokens, 512, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, slopes_of(config))
    out.float().sum().backward()
    assert x.grad.isfinite().all()


@torch.no_grad()
def tiny_model_forward(n_tokens):
    torch.manual_seed(0)
    model = MPT(MPTConfig.named("mpt-tiny")).eval()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(torch.randint(8192, (1, n_tokens)))
    assert hidden.shape == (1, n_tokens, 256)
    assert hidden.isfinite().all()


def test_a_layer_learns_from_65536_tokens_in_under_4_gb():
    assert peak_memory(layer_forward_and_backward, 65_536) < 4e9


def test_memory_of_a_layer_grows_with_the_length_and_not_with_its_square():
    short, long = (peak_memory(layer_forward_and_backward, n) for n in (16_384, 65_536))
    assert long < 4.5 * short


def test_the_small_model_reads_84000_tokens():
    assert peak_memory(tiny_model_forward, 84_000) < 4e9
