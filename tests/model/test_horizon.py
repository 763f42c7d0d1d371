import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.model import horizon as module
from mptbook.model.alibi import alibi_slopes
from mptbook.model.horizon import UNBOUNDED, horizon, horizons, measured_ranges, tolerance
from mptbook.model.reference import reference

H, K = 6, 10
ERRORS = st.floats(-6, -1).map(lambda x: 10**x)


def window_of(slope, content, error):
    return int(horizons(torch.tensor([slope]), torch.tensor([content]).double(), error))


def rounded(slope):
    return float(torch.tensor(slope))  # to float32, as slopes are kept


def worst_change(slope, largest, window):
    """What a window changes, in float64, where every key in it scores least and the others most.

    The keys in the window have the value 0 and the others 1, so the spread is 1 and the output
    within the window 0.
    """
    n_keys = window + math.ceil(45 / slope)  # what lies beyond weighs less than float64 holds
    distance = torch.arange(n_keys, dtype=torch.float64)
    scores = torch.where(distance < window, -largest, largest) - slope * distance
    weights = (scores - scores.max()).softmax(0)
    return float(weights[window:].sum())


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(0.004, 1), largest=st.floats(0, 10), error=ERRORS)
def test_the_worst_keys_there_are_change_the_output_by_less_than_the_error(slope, largest, error):
    slope = rounded(slope)
    window = window_of(slope, 2 * largest, error)
    # A sum of some thousand float64.
    assert worst_change(slope, largest, window) < error * (1 + 1e-10)


@settings(max_examples=30, deadline=None)
@given(slope=st.floats(0.004, 0.5), largest=st.floats(0, 10), error=ERRORS)
def test_a_window_one_nat_shorter_would_not_hold(slope, largest, error):
    slope = rounded(slope)
    window = window_of(slope, 2 * largest, error) - math.ceil(1 / slope)
    assert worst_change(slope, largest, window) > error


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), slope=st.floats(0.2, 1), size=st.floats(0, 4), error=ERRORS)
def test_the_gradients_of_the_scores_change_by_three_times_the_error_at_most(
    seed, slope, size, error
):
    slope, generator = rounded(slope), torch.Generator().manual_seed(seed)
    window = window_of(slope, 2 * size, error)
    distance = torch.arange(window + 60, dtype=torch.float64)
    signs = torch.where(distance < window, -size, size)
    content = signs if seed % 2 else signs * torch.rand(len(distance), generator=generator).double()
    through = torch.randn(len(distance), generator=generator).double()  # (grad of output) . v
    if seed % 3:
        through = (distance >= window).double()

    def gradients(seen):
        weights = (content - slope * distance).masked_fill(~seen, -math.inf).softmax(0)
        return weights * (through - weights @ through)

    change = gradients(distance >= 0) - gradients(distance < window)
    spread = through.max() - through.min()
    assert change.abs().sum() <= 3 * error * spread


@pytest.mark.parametrize("content", [0.0, 700.0, math.inf, math.nan])
def test_a_head_without_a_slope_has_no_horizon(content):
    assert window_of(0.0, content, 1e-3) == UNBOUNDED == 2**62


@pytest.mark.parametrize("content", [math.inf, math.nan])
def test_scores_without_a_bound_leave_nothing_out(content):
    assert window_of(0.5, content, 1e-3) == UNBOUNDED


def test_large_scores_do_not_overflow():
    # log(1 + exp(r) / error) is r - log(error) here.
    assert window_of(0.5, 5000.0, 1.0) == 10_000
    assert window_of(0.5, 5000.0, math.exp(-10)) == 10_020


@pytest.mark.parametrize("slope", [1.0, 0.3, 2.0**-8])
def test_a_window_holds_one_nat_at_least(slope):
    assert window_of(slope, 0.0, 100.0) == math.ceil(1 / rounded(slope))


@pytest.mark.parametrize("error", [0.0, -1e-3, math.nan])
def test_an_error_that_is_not_above_zero_is_refused(error):
    with pytest.raises(ValueError, match=f"error is {error}; a horizon needs a tolerance above 0"):
        window_of(0.5, 1.0, error)


def excess(q, k, slopes, scale):
    """(H,) float64: the largest log(dropped / kept) + m w of all queries and windows w >= 1 / m."""
    n_queries, n_keys = q.shape[2], k.shape[2]
    k = k.repeat_interleave(H // k.shape[1], dim=1).double()
    scores = scale * (q.double() @ k.mT)
    distance = torch.arange(n_keys)[n_keys - n_queries :, None] - torch.arange(n_keys)
    scores = scores - slopes.double()[:, None, None] * distance
    found = torch.full((H,), -math.inf, dtype=torch.float64)
    for head, slope in enumerate(slopes.tolist()):
        for window in range(math.ceil(1 / slope), n_keys):
            near = (distance >= 0) & (distance < window)
            far = distance >= window
            kept = scores[:, head].masked_fill(~near, -math.inf).logsumexp(2)
            dropped = scores[:, head].masked_fill(~far, -math.inf).logsumexp(2)
            found[head] = max(found[head], float((dropped - kept).max()) + slope * window)
    return found


def queries_and_keys(seed, n_queries, n_keys, kv_heads, size, common, against):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, H, n_queries, K, generator=generator)
    k = size * torch.randn(2, kv_heads, n_keys, K, generator=generator)
    if against:  # near keys point away from one query of the group, far ones towards it
        towards = q[:, :: H // kv_heads, -1:]
        near = torch.arange(n_keys)[:, None] >= n_keys - 5
        k = size * torch.where(near, -towards, towards) + 0.1 * k
    return q, k + common * torch.randn(2, kv_heads, 1, K, generator=generator)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    n_queries=st.integers(1, 29),
    kv_heads=st.sampled_from([6, 2, 1]),
    size=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    common=st.sampled_from([0.0, 3.0, 100.0]),
    against=st.booleans(),
)
def test_what_is_dropped_never_exceeds_the_measured_range(
    seed, n_queries, kv_heads, size, common, against
):
    q, k = queries_and_keys(seed, n_queries, 29, kv_heads, size, common, against)
    slopes = torch.tensor([1.0, 0.7, 0.5, 0.31, 0.13, 0.06])
    found = measured_ranges(q, k, slopes, 0.3)
    assert found.shape == (H,)
    assert found.dtype == torch.float64
    assert (excess(q, k, slopes, 0.3) <= found).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.1, 3))
def test_the_measured_range_is_near_where_the_keys_are_at_their_worst(seed, size):
    # One direction: far keys score R after the mean is taken away, the nearest least.
    generator = torch.Generator().manual_seed(seed)
    n_keys, slope = 400, 0.5
    q = torch.randn(1, 1, 1, K, generator=generator).expand(1, H, 1, K)
    away = torch.where(torch.arange(n_keys)[:, None] >= n_keys - 200, -1.0, 1.0)
    k = (size * away * q[:, 0]).unsqueeze(1)
    slopes = torch.full((H,), slope)
    gap = measured_ranges(q, k, slopes, 0.3) - excess(q, k, slopes, 0.3)
    # The proof gives away the geometric tail and Jensen's inequality: less than a nat. The
    # excess is taken over windows of 2 to 399 tokens, the worst of 200 among them.
    assert (gap >= 0).all()
    assert (gap < 1).all()


def test_what_all_keys_have_in_common_costs_nothing():
    q, k = queries_and_keys(0, 17, 29, 2, 1.0, 0.0, False)
    slopes = torch.linspace(0.1, 1, H)
    plain = measured_ranges(q, k, slopes, 0.3)
    # Keys of about 10 in float32, and the allowance of 1e-5 for rounding.
    moved = measured_ranges(q, k + 10 * torch.ones(K), slopes, 0.3)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4)


def test_a_head_whose_queries_have_too_few_keys_drops_none():
    q, k = queries_and_keys(0, 17, 17, 6, 1.0, 0.0, False)
    assert measured_ranges(q, k, torch.full((H,), 1 / 40), 0.3).tolist() == [0] * H


def long_inputs(n_queries, n_keys, kv_heads, dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(2, H, n_queries, K)
    k, v = torch.randn(2, 2, kv_heads, n_keys, K)
    k = k + 4 * torch.randn(K)  # without which trained keys never are
    return [x.to(dtype).requires_grad_() for x in (q, k, v)]


@pytest.fixture
def _from_the_first_token(monkeypatch):
    monkeypatch.setattr(module, "HORIZON_TOKENS", 1)
    monkeypatch.setattr("mptbook.model.windows.BLOCK_QUERIES", 16)


@pytest.fixture
def windows_used(monkeypatch):
    used, windowed = [], module.windowed

    def spy(*args, windows, **how):
        used.append(windows)
        return windowed(*args, windows=windows, **how)

    monkeypatch.setattr(module, "windowed", spy)
    return used


DOCUMENTS = torch.tensor([[0] * 90 + [1] * 67, [4] * 50 + [2] * 57 + [4] * 50])


@pytest.mark.usefixtures("_from_the_first_token")
@pytest.mark.parametrize("error", [None, 1e-3, 0.1])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize(("n_queries", "kv_heads"), [(157, 6), (157, 1), (61, 2)])
def test_the_output_is_within_the_error_of_the_reference(
    monkeypatch, windows_used, n_queries, kv_heads, documents, error
):
    if error is not None:
        monkeypatch.setattr(module, "tolerance", lambda dtype: error)
    qkv, slopes = long_inputs(n_queries, 157, kv_heads), alibi_slopes(H, 1)
    how = {"scale": 0.1, "documents": documents}
    exact, near = reference(*qkv, slopes, **how), horizon(*qkv, slopes, **how)
    assert windows_used[0].min() < 80  # so keys were left out, or this would show nothing
    v = qkv[2].detach().repeat_interleave(H // kv_heads, dim=1)
    spread = (v.amax(2) - v.amin(2))[:, :, None]
    # Besides, float32 sums in another order.
    assert ((near - exact).abs() <= (error or tolerance(torch.float32)) * spread + 1e-6).all()
    torch.manual_seed(1)
    grad = torch.randn(exact.shape)
    exact, near = (torch.autograd.grad(out, qkv, grad) for out in (exact, near))
    for one, other in zip(near, exact, strict=True):
        # Those of the scores sum to 3 errors per query; q, k and v are of size 1 or a few.
        assert (one - other).norm() <= (10 * (error or 0) + 1e-5) * other.norm()


@pytest.mark.usefixtures("_from_the_first_token")
def test_bfloat16_needs_less_reach_and_is_near_the_reference(windows_used):
    slopes = alibi_slopes(H, 1)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = long_inputs(157, 157, 2, dtype)
        near = horizon(*qkv, slopes, scale=0.1)
    exact = reference(*qkv, slopes, scale=0.1)
    assert (windows_used[1] < windows_used[0]).all()
    assert (near - exact).norm() < 3 * 2**-8 * exact.norm()  # weights and output of 8 bits


def test_short_rows_are_not_measured_and_windows_given_are_kept(windows_used):
    qkv, slopes = long_inputs(61, 157, 6), alibi_slopes(H, 1)
    given_windows = torch.tensor([3, 9, 20, 150, 157, 1000])
    horizon(*qkv, slopes, scale=0.1)
    horizon(*qkv, slopes, scale=0.1, windows=given_windows)
    assert [x.tolist() for x in windows_used] == [[157] * H, [3, 9, 20, 150, 157, 157]]


@pytest.mark.usefixtures("_from_the_first_token")
def test_wide_windows_become_all_keys_unless_there_are_documents(windows_used):
    qkv = long_inputs(157, 157, 6)
    slopes = torch.tensor([1.0, 0.7, 0.35, 0.16, 0.14, 0.0])
    reach = horizons(slopes, measured_ranges(qkv[0], qkv[1], slopes, 0.1), tolerance(torch.float32))
    assert ((reach > 0.6 * 157) & (reach < 157)).any()
    horizon(*qkv, slopes, scale=0.1)
    horizon(*qkv, slopes, scale=0.1, documents=DOCUMENTS)
    wide = torch.where(reach > 0.6 * 157, 157, reach)
    assert torch.equal(windows_used[0], wide)
    assert torch.equal(windows_used[1], reach.clamp(max=157))
