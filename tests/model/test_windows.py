import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.model import windows
from mptbook.model.alibi import alibi_slopes
from mptbook.model.reference import reference, visible
from mptbook.model.windows import blocks, first_of_document, threads_of, windowed

H, K = 6, 10
NEAR = torch.tensor([1, 2, 5, 16, 17, 40])


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(batch, n_queries, n_keys, kv_heads=H, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, H, n_queries, K, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, n_keys, K, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


def output_and_gradients(form, qkv, slopes=None, **how):
    out = form(*qkv, alibi_slopes(H) if slopes is None else slopes, scale=0.3, **how)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, qkv, torch.randn(out.shape).to(out.dtype))]


def assert_equal_to_the_reference(qkv, **how):
    expected = output_and_gradients(reference, qkv, **how)
    actual = output_and_gradients(windowed, qkv, **how)
    # Sums of float32 in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_windows_blocks_documents_and_lengths_equal_the_reference(data):
    n_keys = data.draw(st.integers(1, 23))
    n_queries = data.draw(st.integers(1, n_keys))
    near = data.draw(st.lists(st.integers(1, 30), min_size=H, max_size=H))
    ids = st.lists(st.integers(0, 2), min_size=n_keys, max_size=n_keys)
    documents = data.draw(st.none() | st.tuples(ids, ids).map(torch.tensor))
    kv_heads = data.draw(st.sampled_from([1, 2, 3, 6]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK_QUERIES", data.draw(st.integers(1, 9)))
        how = {"windows": torch.tensor(near), "documents": documents}
        assert_equal_to_the_reference(inputs(2, n_queries, n_keys, kv_heads), **how)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("block", [8, 5])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(17, 17), (16, 16), (12, 17)])
@pytest.mark.parametrize("near", [NEAR, torch.full((H,), 99)], ids=["windows", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_queries_split_among_threads_give_the_same(
    monkeypatch, block, n_queries, n_keys, near, packed
):
    monkeypatch.setattr(windows, "BLOCK_QUERIES", block)
    documents = torch.tensor([[0] * 7 + [1] * (n_keys - 7)]) if packed else None
    qkv = inputs(1, n_queries, n_keys, 2)
    assert_equal_to_the_reference(qkv, windows=near, documents=documents)


@pytest.mark.usefixtures("_two_threads")
def test_one_head_of_one_row_is_split_into_as_many_parts_as_there_are_threads():
    assert threads_of(torch.empty(1, 1, 8, K)) == 2
    assert threads_of(torch.empty(1, 1, 7, K)) == 1  # in no equal parts
    assert threads_of(torch.empty(2, 1, 8, K)) == 1  # a row for each thread
    assert threads_of(torch.empty(1, 2, 8, K)) == 1


def test_bfloat16_is_near_the_reference(monkeypatch):
    monkeypatch.setattr(windows, "BLOCK_QUERIES", 5)
    qkv = inputs(2, 13, 17, 2, torch.bfloat16)
    expected = output_and_gradients(reference, qkv, windows=NEAR)
    actual = output_and_gradients(windowed, qkv, windows=NEAR)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.bfloat16
        # Weights, outputs and their gradients pass through numbers of 8 bits.
        assert (one - other).norm() < 3 * 2**-8 * other.norm()


def test_slopes_of_zero_leave_plain_causal_attention():
    qkv = inputs(2, 17, 17)
    plain = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, scale=0.3)
    everything = torch.full((H,), 17)
    out = windowed(*qkv, torch.zeros(H), scale=0.3, windows=everything)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 40 + [1] * 63, [5] * 103])])
def test_a_block_reads_only_keys_that_one_of_its_queries_can_see(monkeypatch, documents):
    monkeypatch.setattr(windows, "BLOCK_QUERIES", 16)
    n_queries, n_keys, window = 90, 103, 7
    near = torch.tensor([window])
    whole = visible(torch.ones(1), n_queries, n_keys, documents, near)
    for rows, keys, bias in blocks(n_queries, n_keys, torch.ones(1), window, documents):
        assert torch.equal(bias, whole[:, :, rows, keys])
        used = whole[:, :, rows].isfinite().any(2).any(0)[0].nonzero()[:, 0]
        assert (keys.start, keys.stop) == (used.min(), used.max() + 1)


def test_keys_outside_the_window_leave_no_trace():
    # Not even numbers that are none: what lies outside is never read.
    q, k, v = (x.detach() for x in inputs(2, 17, 17))
    near = torch.full((H,), 4)
    before = windowed(q, k, v, alibi_slopes(H), scale=0.3, windows=near)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK_QUERIES", 3)
        k[:, :, :5] = v[:, :, :5] = torch.nan
        after = windowed(q, k, v, alibi_slopes(H), scale=0.3, windows=near)
    # Queries 9, 10 and 11 stand in one block, whose first key is 6.
    torch.testing.assert_close(after[:, :, 9:], before[:, :, 9:])


def test_the_first_token_of_a_document_is_found_wherever_its_parts_lie():
    documents = torch.tensor([[3, 3, 8, 8, 3], [1, 0, 0, 1, 8]])
    assert first_of_document(documents).tolist() == [[0, 0, 2, 2, 0], [0, 1, 1, 0, 4]]


def test_no_queries_give_no_output():  # PyTorch's kernel would divide by zero
    q, k, v = inputs(2, 0, 17)
    assert windowed(q, k, v, alibi_slopes(H), scale=0.3, windows=NEAR).shape == (2, H, 0, K)
