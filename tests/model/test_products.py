import pytest
import torch

from mptbook.model.alibi import alibi_bias, alibi_slopes
from mptbook.model.products import fold_distance, products


def test_the_channels_add_the_bias_to_eight_bits_and_not_to_the_length_of_the_row():
    slopes = alibi_slopes(6, bias_max=11.3)  # no powers of two
    q = k = torch.zeros(1, 6, 700, 4, dtype=torch.bfloat16)
    q, k = fold_distance(q[:, :, 500:], k, slopes)
    scores = (q.float() @ k.float().mT)[0]
    bias = alibi_bias(slopes, 200, 700)[0]
    past = bias.isfinite()
    # The slope is a sum of two numbers of 8 bits; the rest is exact.
    torch.testing.assert_close(scores[past], bias[past], rtol=2**-15, atol=1e-4)


def test_more_keys_than_two_numbers_of_eight_bits_can_count_are_refused():
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 65_537, 8)
    with pytest.raises(ValueError, match=r"65,537 keys, but products takes 65,536; use sdpa"):
        products(q, k, k, alibi_slopes(1), scale=1.0)


def test_the_gradients_are_the_derivatives(monkeypatch):
    monkeypatch.setattr("mptbook.model.products.BLOCK_QUERIES", 3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    how = {"scale": 0.3, "windows": torch.tensor([2, 7])}
    assert torch.autograd.gradcheck(lambda *qkv: products(*qkv, alibi_slopes(2), **how), (q, k, v))
