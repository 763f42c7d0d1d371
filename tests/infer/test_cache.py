import copy
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer.cache import HorizonCache, KVCache, windows_of
from mptbook.model.config import MPTConfig
from mptbook.model.horizon import horizons, static_ranges, tolerance
from mptbook.model.mpt import MPT
from mptbook.model.reference import reference

H, D, V = 6, 60, 97
GROUPS = {
    6: {},
    2: {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    1: {"attn_type": "multiquery_attention"},
}
SHORT = {  # two layers of windows for every number of key heads
    6: [[1, 2, 3, 5, 8, 40], [7, 1, 4, 4, 9, 30]],
    2: [[3, 8], [1, 11]],
    1: [[4], [9]],
}
# float32 through two layers, in sums of another order; folding adds 2 ** -24 of slope * Tk.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def model(kv_heads=H, bias_max=8.0):
    torch.manual_seed(0)
    config = MPTConfig(d_model=D, n_heads=H, n_layers=2, max_seq_len=64, vocab_size=V)
    return MPT(config.replace(alibi_bias_max=bias_max, **GROUPS[kv_heads])).eval()


@functools.cache
def shortsighted(kv_heads=H):
    """A model whose heads all need fewer than 120 keys: steep slopes, small scores."""
    near = copy.deepcopy(model(kv_heads, 1.0))
    for block in near.transformer.blocks:
        block.attn.Wqkv.weight.data[: D + D // H * kv_heads] /= 2  # of queries and keys
    assert max(map(max, windows_of(near))) < 120
    return near


def with_windows(whole, windows):
    """The same model, whose heads see their windows only."""
    near = copy.deepcopy(whole)
    for block, ours in zip(near.transformer.blocks, windows, strict=True):
        each = torch.tensor(ours).repeat_interleave(H // len(ours))
        block.attn.backend = functools.partial(reference, windows=each)
    return near


def left_pad(rows):
    """Rows that end together, and document ids that keep the padding (0) from them."""
    longest = max(map(len, rows))
    ids, documents = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        documents[i, longest - len(row) :] = 1
    return ids, documents


def some_ids(batch, n_tokens, seed=0):
    return torch.randint(0, V, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_in_pieces(whole, cache, ids, sizes, documents=None):
    out, seen = [], 0
    for part in ids.split(sizes, dim=1):
        seen += part.shape[1]
        own = None if documents is None else documents[:, :seen]
        out.append(whole(part, documents=own, cache=cache))
        assert len(cache) == seen
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_token_by_token_each_head_sees_its_window(kv_heads):
    ids, windows = some_ids(2, 53), SHORT[kv_heads]
    logits = logits_in_pieces(model(kv_heads), HorizonCache(windows), ids, [1] * 53)
    expected = with_windows(model(kv_heads), windows)(ids)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not torch.allclose(expected, model(kv_heads)(ids), **CLOSE)  # windows matter here


@torch.no_grad()
def test_after_a_prompt_read_in_whole_each_head_sees_its_window():
    # In one layer, whose keys are those of the tokens whatever was seen.
    whole = copy.deepcopy(model())
    del whole.transformer.blocks[1]
    ids, windows = some_ids(2, 53), SHORT[6][:1]
    logits = logits_in_pieces(whole, HorizonCache(windows), ids, [29] + [1] * 24)
    torch.testing.assert_close(logits[:, :29], whole(ids[:, :29]), **CLOSE)
    torch.testing.assert_close(logits[:, 29:], with_windows(whole, windows)(ids)[:, 29:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 53, [20] + [1] * 33], ids=["by token", "prompt first"])
def test_left_padded_rows_are_told_apart(sizes):
    rows = [ids[0, :n].tolist() for ids, n in ((some_ids(1, 53, 1), 53), (some_ids(1, 53, 2), 44))]
    ids, documents = left_pad(rows)
    many = [[99] * 6, [99] * 6]
    windows = SHORT[6] if sizes[0] == 1 else many
    logits = logits_in_pieces(model(), HorizonCache(windows), ids, sizes, documents)
    near = with_windows(model(), windows)
    for row, tokens in enumerate(rows):
        alone = near(torch.tensor([tokens]))[0]
        torch.testing.assert_close(logits[row, -len(tokens) :], alone, **CLOSE)


def pieces(n_tokens):
    """Ways to cut a row: sizes that add up to `n_tokens`."""
    cuts = st.sets(st.integers(1, n_tokens - 1), max_size=8)
    return cuts.map(lambda at: [b - a for a, b in itertools.pairwise([0, *sorted(at), n_tokens])])


@settings(max_examples=20, deadline=None)
@given(sizes=pieces(53), kv_heads=st.sampled_from([6, 2, 1]))
def test_a_prompt_in_any_pieces_gives_the_logits_of_one_pass(sizes, kv_heads):
    ids = some_ids(2, 53)
    with torch.no_grad():
        expected = model(kv_heads)(ids)
    logits = logits_in_pieces(model(kv_heads), KVCache(2, room=3), ids, sizes)
    torch.testing.assert_close(logits, expected, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(sizes=pieces(149), kv_heads=st.sampled_from([6, 2, 1]))
def test_pieces_through_the_horizon_give_the_logits_of_one_pass(sizes, kv_heads):
    whole, ids = shortsighted(kv_heads), some_ids(2, 149)
    with torch.no_grad():
        expected = whole(ids)
    logits = logits_in_pieces(whole, HorizonCache(windows_of(whole)), ids, sizes)
    torch.testing.assert_close(logits, expected, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(sizes=pieces(37), kv_heads=st.sampled_from([6, 2, 1]))
def test_a_piece_gets_the_window_of_its_first_query_and_itself(sizes, kv_heads):
    windows, cache = SHORT[kv_heads], HorizonCache(SHORT[kv_heads])
    keys = torch.arange(37.0)[:, None].expand(3, kv_heads, 37, 4)
    start = 0
    for size in sizes:
        end = start + size
        for layer in range(2):
            part = keys[:, :, start:end]
            got = cache.extend(layer, part, -part)
            assert len(got) == kv_heads
            for (k, v), window in zip(got, windows[layer], strict=True):
                assert k.shape == v.shape == (3, 1, len(k[0, 0]), 4)
                assert k[2, 0, :, 3].tolist() == list(range(max(0, start - window + 1), end))
                assert torch.equal(v, -k)
        start = end


def test_memory_stops_growing_once_the_windows_are_passed():
    cache, grows = HorizonCache([[5, 9], [3, 40]]), KVCache(2, room=1)
    one, sizes = torch.zeros(3, 2, 1, 4), []
    for _ in range(400):
        for layer in range(2):
            cache.extend(layer, one, one)
            grows.extend(layer, one, one)
        sizes.append(cache.bytes)
    assert len(cache) == 400
    # A head moves when its room is full: twice what it keeps, and 16.
    rooms = sum(2 * (window - 1) + 16 for window in (5, 9, 3, 40))
    assert set(sizes[120:]) == {rooms * 2 * 3 * 4 * 4}  # k and v, rows, width, bytes
    assert sizes[-1] < grows.bytes / 5


def test_an_empty_cache_has_seen_nothing():
    cache = HorizonCache(SHORT[2])
    assert len(cache) == cache.bytes == 0


@pytest.mark.parametrize("error", [None, 1e-2])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_a_key_head_is_kept_for_the_farthest_sighted_of_its_queries(kv_heads, error):
    whole = model(kv_heads)
    found = windows_of(whole, error)
    for block, windows in zip(whole.transformer.blocks, found, strict=True):
        ranges = static_ranges(block.attn, block.norm_1)
        each = horizons(whole.slopes, ranges, error or tolerance(torch.float32)).tolist()
        shared = H // kv_heads
        assert windows == [max(each[g * shared : (g + 1) * shared]) for g in range(kv_heads)]


def test_a_model_without_alibi_forgets_nothing():
    config = model().config.replace(alibi=False)
    assert windows_of(MPT(config)) == [[2**62] * H] * 2


@torch.no_grad()
def test_three_hundred_tokens_through_the_horizon_equal_those_through_all_keys():
    whole = shortsighted()
    all_keys, near = KVCache(2), HorizonCache(windows_of(whole))
    token, far_token = torch.tensor([[5], [71]]), torch.tensor([[5], [71]])
    for _ in range(300):
        far, seen = whole(far_token, cache=all_keys), whole(token, cache=near)
        torch.testing.assert_close(seen, far, **CLOSE)
        token, far_token = seen[:, -1:].argmax(2), far[:, -1:].argmax(2)
        assert torch.equal(token, far_token)
    assert len(near) == len(all_keys) == 300
    assert near.bytes < all_keys.bytes
