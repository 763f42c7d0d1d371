import pytest
import torch

from mptbook.model.alibi import alibi_slopes
from mptbook.model.folding import FOLDED_CHANNELS, fold, runs, sdpa
from mptbook.model.reference import reference

H, K = 6, 10


def folded_bias(n_keys, slopes, scale, dtype, keys):
    """(H, keys) float64: what folding adds to the score of a query, by the key's position."""
    q, k = torch.zeros(1, H, 1, K, dtype=dtype), torch.zeros(1, H, n_keys, K, dtype=dtype)
    q, k, _ = fold(q, k, k, slopes, scale)
    return scale * (q.double() @ k[:, :, keys].double().mT)[0, :, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [K**-0.5, 0.37, 1.0])
def test_scores_differ_by_slope_times_distance_up_to_84_000_positions(scale, dtype):
    n_keys = 84_000
    far = [0, 1, 255, 256, 257, 511, 65_535, 65_536, 65_537, 70_001]
    keys = torch.tensor([*far, n_keys - 300, n_keys - 2, n_keys - 1])
    slopes = alibi_slopes(H)
    bias = folded_bias(n_keys, slopes, scale, dtype, keys)
    exact = slopes[:, None].double() * (keys - n_keys + 1)
    # Two numbers of 8 bits hold 17 bits of a slope: the sign of the second is one more.
    torch.testing.assert_close(bias - bias[:, -1:], exact, rtol=2**-16, atol=0)


def test_position_zero_has_no_bias_and_the_content_is_as_it_was():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, H, 17, K)
    folded = fold(q, k, v, alibi_slopes(H), 0.3)
    for one, whole in zip((q, k, v), folded, strict=True):
        assert whole.shape == (2, H, 17, K + FOLDED_CHANNELS)
        assert torch.equal(whole[..., :K], one)
    assert not folded[1][:, :, 0, K:].any()
    assert not folded[2][..., K:].any()


def test_every_folded_number_fits_into_eight_bits():
    q, k = torch.zeros(1, H, 1, K), torch.zeros(1, H, 70_001, K)
    folded = fold(q, k, k, alibi_slopes(H), 0.37)
    exact = fold(q.bfloat16(), k.bfloat16(), k.bfloat16(), alibi_slopes(H), 0.37)
    assert torch.equal(folded[1], exact[1].float())
    coarse = slice(K, K + 3)  # the fine parts may round, to 2 ** -8 of themselves
    assert torch.equal(folded[0][..., coarse], exact[0][..., coarse].float())


def test_a_late_query_weighs_its_neighbours_as_an_early_one_does_in_bfloat16():
    # Only the last 40 of 66,001 keys are told apart by content; the others lie far below.
    torch.manual_seed(0)
    n_keys, near = 66_001, 40
    q, k, v = torch.randn(3, 1, H, n_keys, K).bfloat16()
    slopes = torch.full((H,), 1.0)
    folded = fold(q[:, :, -1:], k, v, slopes, 0.3)
    scores = 0.3 * (folded[0].float() @ folded[1].float().mT)
    weights = scores.softmax(3)[..., -near:]
    short = [x[:, :, -near:] for x in (q, k, v)]
    expected = reference(*short, slopes, scale=0.3)[:, :, -1].float()
    out = (weights @ short[2].float())[:, :, 0]
    # Scores of 66,000 nats in float32 have a step of 2 ** -7; sums of 16 terms lose a few steps.
    torch.testing.assert_close(out, expected, rtol=0, atol=0.05)


def test_runs_are_where_documents_lie():
    documents = torch.tensor([[4, 4, 9, 9, 9], [1, 2, 2, 2, 0], [7, 7, 7, 7, 7]])
    spans = [[(r.start, r.stop) for r in row] for row in runs(documents)]
    assert spans == [[(0, 2), (2, 5)], [(0, 1), (1, 4), (4, 5)], [(0, 5)]]


def test_a_document_that_comes_again_is_no_run():
    assert runs(torch.tensor([[0, 1, 0]])) is None
    assert runs(torch.tensor([[0, 0, 1], [5, 6, 5]])) is None


@pytest.mark.parametrize("kv_heads", [6, 1])
def test_scores_of_every_scale_are_those_of_the_reference(kv_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, H, 17, K), *torch.randn(2, 2, kv_heads, 17, K)
    for scale in (0.01, 1.7):
        expected = reference(q, k, v, alibi_slopes(H), scale=scale)
        actual = sdpa(q, k, v, alibi_slopes(H), scale=scale)
        # Slopes are divided by the scale in float32, and multiplied by it again.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
