import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.model.alibi import alibi_slopes
from mptbook.model.flash import OnlineSoftmax, SlowMemory, flash_attention, standard_attention
from mptbook.model.reference import reference

B, H, K = 2, 6, 10


def inputs(n_queries, n_keys, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(B, H, n_queries, K)
    k, v = torch.randn(2, B, H, n_keys, K)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def output_and_gradients(form, qkv, **how):
    torch.manual_seed(1)
    out = form(*qkv, alibi_slopes(H), scale=0.3, **how)
    return [out, *torch.autograd.grad(out, qkv, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize("tile", [5, 1, 17, 64])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(17, 17), (4, 17), (1, 17), (11, 13)])
def test_tiles_of_any_size_equal_the_reference(tile, n_queries, n_keys):
    qkv = inputs(n_queries, n_keys)
    expected = output_and_gradients(reference, qkv)
    actual = output_and_gradients(flash_attention, qkv, tile=tile)
    # Sums of float32 in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_queries", [17, 4])
def test_bfloat16_is_near_the_reference(n_queries):
    qkv = inputs(n_queries, 17, torch.bfloat16)
    expected = output_and_gradients(reference, qkv)
    actual = output_and_gradients(flash_attention, qkv, tile=5)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # Only what is stored has 8 bits: the output, and the gradients through it.
        assert (one - other).norm() < 2 * 2**-8 * other.norm()


def test_the_bytes_of_three_queries_and_four_keys_in_tiles_of_two():
    q, k, v = torch.randn(3, 1, 1, 4, 5).unbind()
    q = q[:, :, 1:].clone().requires_grad_()  # on the keys 1, 2 and 3
    memory = SlowMemory()
    out = flash_attention(q, k, v, torch.ones(1), scale=0.3, tile=2, memory=memory)
    # The queries on keys 1 and 2 and the one on key 3 each read both tiles of keys and values.
    assert memory.loaded == 4 * 5 * (2 + 8 + 1 + 8)
    assert memory.stored == 4 * 3 * (5 + 1)  # an output and a log of a sum per query
    out.sum().backward()
    common = 2 * 3 * 5  # the gradient and the output of every query
    keys = 8 * 5  # each key and each value once
    # Per tile of keys: queries, gradients and gradients so far, and two numbers per query.
    queries = 2 * 3 * (3 * 5 + 2)
    assert memory.loaded == 4 * (5 * 19 + common + keys + queries)
    assert memory.stored == 4 * (3 * 6 + 3 + keys + 2 * 3 * 5)
    assert memory.moved == memory.loaded + memory.stored


def test_tiles_in_the_future_are_not_read():
    q, k, v = torch.randn(3, 1, 1, 6, 5).unbind()
    memory = SlowMemory()
    flash_attention(q, k, v, torch.ones(1), scale=0.3, tile=2, memory=memory)
    assert memory.loaded == 4 * 5 * (6 + 2 * 2 * (1 + 2 + 3))


def test_bfloat16_moves_half_the_bytes_of_what_is_read():
    q, k, v = torch.randn(3, 1, 1, 6, 5).bfloat16().unbind()
    memory = SlowMemory()
    flash_attention(q, k, v, torch.ones(1), scale=0.3, tile=2, memory=memory)
    assert memory.loaded == 2 * 5 * (6 + 2 * 2 * (1 + 2 + 3))
    assert memory.stored == 2 * 6 * 5 + 4 * 6  # the log of the sum stays float32


@pytest.mark.parametrize("n_queries", [17, 4])
def test_the_standard_way_equals_the_reference_and_moves_the_matrices(n_queries):
    q, k, v = (x.detach() for x in inputs(n_queries, 17))
    memory = SlowMemory()
    out = standard_attention(q, k, v, alibi_slopes(H), scale=0.3, memory=memory)
    torch.testing.assert_close(out, reference(q, k, v, alibi_slopes(H), scale=0.3))
    matrix, rows = n_queries * 17, K * (n_queries + 17)
    # q, k and scores; scores and weights; weights, v and the output: 4 times a matrix in all.
    assert memory.moved == 4 * B * H * (4 * matrix + 2 * rows)


def test_the_standard_way_moves_more_than_tiles_do():
    q, k, v = torch.randn(3, 1, 1, 130, K).unbind()
    standard, tiled = SlowMemory(), SlowMemory()
    standard_attention(q, k, v, torch.ones(1), scale=0.3, memory=standard)
    flash_attention(q, k, v, torch.ones(1), scale=0.3, tile=64, memory=tiled)
    assert standard.moved > 5 * tiled.moved


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=st.sampled_from([1.0, 30.0, 1e4]))
def test_a_softmax_in_any_pieces_equals_one_in_whole(data, size):
    pieces = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = size * torch.randn(3, sum(pieces), generator=generator)  # exp(1e4) is no float32
    values = torch.randn(3, sum(pieces), K, generator=generator)
    online = OnlineSoftmax(values.new_empty(3, 1, K))
    for part, value in zip(scores.split(pieces, 1), values.split(pieces, 1), strict=True):
        online.add(part[:, None], value)
    mean = (scores.double().softmax(1)[:, None] @ values.double()).float()
    # Differences of scores keep float32's 2 ** -24 of their size, 1e4 or more.
    bound = 1e-5 + 2**-22 * size
    torch.testing.assert_close(online.mean, mean, rtol=bound, atol=bound)
    torch.testing.assert_close(online.log_sum[:, 0], scores.logsumexp(1), rtol=1e-6, atol=bound)


def test_scores_that_rise_piece_by_piece_do_not_overflow():
    online = OnlineSoftmax(torch.empty(1, 1))
    for score in (-1e4, 0.0, 1e4, 1e4):
        online.add(torch.tensor([[score]]), torch.tensor([[score]]))
    assert online.mean.item() == 1e4
    assert online.log_sum.item() == pytest.approx(1e4 + 0.6931, abs=1e-3)


def test_more_queries_than_keys_is_refused():
    with pytest.raises(ValueError, match="4 queries but only 3 keys; pass the cached keys"):
        flash_attention(*inputs(4, 3), alibi_slopes(H), scale=0.3)
