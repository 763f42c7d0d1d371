import copy
import functools

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptbook.infer.quantize import PackedLinear, pack, quantize
from mptbook.infer.slots import Slots
from mptbook.infer.views import stored
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.model.precision import autocast

V = 97
SHAPES = {
    "plain": {},
    "grouped keys": {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "one key head": {"attn_type": "multiquery_attention"},
    "clipped, far-sighted": {"clip_qkv": 0.5, "alibi_bias_max": 16},
    "normed keys and a scale": {"qk_ln": True, "softmax_scale": 0.2},
    "biases": {"no_bias": False},
    "learned positions": {"alibi": False, "learned_pos_emb": True},
    "RMSNorm, own head": {"norm_type": "rmsnorm", "tie_word_embeddings": False},
    "scaled logits": {"logit_scale": 0.25, "expansion_ratio": 2},
}
# Sums in another order, through three layers; logits are up to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Relative to the largest logit: 8 bits of each key and value, and 127 steps.
COARSE = {"bfloat16": 0.01, "int8": 0.03}


@functools.cache
def model(shape="plain"):
    torch.manual_seed(1)
    config = MPTConfig(d_model=66, n_heads=6, n_layers=3, max_seq_len=64, vocab_size=V)
    found = MPT(config.replace(**SHAPES[shape])).eval()
    with torch.no_grad():
        for weight in found.parameters():  # gains and biases that are not one and zero
            weight.add_(0.1 * torch.randn_like(weight))
    return found


def some_ids(n_rows, n_tokens, seed=0):
    return torch.randint(0, V, (n_rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["compiled", "padded"])
def form(request, monkeypatch):
    """The two ways of writing a token; the second is that of a GPU."""
    if request.param == "padded":
        monkeypatch.setattr(Slots, "_look", lambda slots: None)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_written_side_by_side_are_those_of_one_forward_pass(shape, form):
    ids, whole = some_ids(5, 30), model(shape)
    slots = Slots(whole, 6, 30)
    places, starts = [4, 0, 5, 2, 1], [1, 17, 8, 2, 29]
    for row, (slot, start) in enumerate(zip(places, starts, strict=True)):
        slots.read(slot, ids[row, :start].tolist())
    with torch.no_grad():
        expected = whole(ids)
    for _ in range(29):
        rows = [row for row in range(5) if slots.lengths[places[row]] < 30]
        at = [slots.lengths[places[row]] for row in rows]
        logits = slots.decode([places[row] for row in rows], ids[rows, at].tolist())
        torch.testing.assert_close(logits, expected[rows, at], **CLOSE)
    assert slots.lengths == [30, 30, 30, 0, 30, 30]


@pytest.mark.parametrize("dtype", COARSE)
def test_a_cache_of_fewer_bits_changes_logits_by_its_rounding(dtype, form):
    ids, whole = some_ids(1, 40), model()
    slots = Slots(whole, 2, 40, dtype)
    read = slots.read(1, ids[0, :20].tolist(), every=True)
    written = torch.cat([slots.decode([1], [int(i)]) for i in ids[0, 20:]])
    with torch.no_grad():
        expected = whole(ids)[0]
    error = (torch.cat([read, written]) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < error < COARSE[dtype]


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    other = Doubled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    return other


def another(layer):
    other = copy.deepcopy(layer)
    other.weight.data.mul_(1.5)
    return other


def in_8_bits(layer):
    return PackedLinear(*pack(layer.weight.detach(), 8), None)


def of_another_class(layer):
    layer.__class__ = Doubled  # as FSDP does
    return layer


def of_other_weights(layer):
    layer.load_state_dict(another(layer).state_dict(), assign=True)
    return layer


@pytest.mark.parametrize(
    "changed", [doubled, another, in_8_bits, of_another_class, of_other_weights]
)
def test_tokens_are_those_of_the_model_as_it_is_now(changed):
    ids, whole = some_ids(1, 9)[0].tolist(), copy.deepcopy(model())
    slots = Slots(whole, 1, 9)
    ffn, expected = whole.transformer.blocks[1].ffn, []
    for change in (None, changed):
        if change is not None:
            ffn.up_proj = change(ffn.up_proj)
        slots.crop(0, 0)
        written = torch.cat([slots.decode([0], [i]) for i in ids])
        expected.append(whole(torch.tensor([ids]))[0])
        torch.testing.assert_close(written, expected[-1], **CLOSE)
    assert (expected[1] - expected[0]).abs().max() > 10 * CLOSE["atol"]


@pytest.mark.parametrize("names", [["ffn.up_proj"], ["attn.Wqkv", "ffn.down_proj"]])
def test_some_layers_may_be_packed_and_others_not(names):
    ids, mixed = some_ids(1, 40), copy.deepcopy(model())
    for block in mixed.transformer.blocks:
        for name in names:
            block.set_submodule(name, in_8_bits(block.get_submodule(name)))
    slots = Slots(mixed, 1, 40, "bfloat16")
    found = slots.read(0, ids[0].tolist(), every=True)
    with torch.no_grad():
        expected = mixed(ids)[0]
    assert (found - expected).abs().max() < COARSE["bfloat16"] * expected.abs().max()


def test_another_model_in_the_place_of_the_first_is_the_one_that_writes():
    slots, other = Slots(model(), 1, 9), model("RMSNorm, own head")
    slots.model = other
    found = slots.decode([0], [3])
    torch.testing.assert_close(found, other(torch.tensor([[3]]))[0], **CLOSE)


@pytest.mark.parametrize("wrong", [-1, V, 2**40])
def test_an_id_that_is_none_of_the_models_is_refused(wrong):
    slots = Slots(model(), 2, 9)
    with pytest.raises(ValueError, match=f"{wrong}.*from 0 to {V - 1}"):
        slots.decode([0, 1], [5, wrong])
    assert slots.lengths == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_both_ways_of_writing_a_token_keep_the_same_numbers(dtype, monkeypatch):
    ids = some_ids(1, 20)[0].tolist()
    kept = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(Slots, "_look", lambda slots: None)
        slots = Slots(model(), 1, 20, dtype)
        for i in ids:
            slots.decode([0], [i])
        kept.append(stored(slots, 0, 0, 20, torch.float32))
    for compiled, plain in zip(*kept, strict=True):
        step = compiled.abs().max() * {"float32": 1e-5, "bfloat16": 2**-8, "int8": 1 / 127}[dtype]
        assert (compiled - plain).abs().max() <= 1.01 * step
        assert ((compiled - plain).abs() < step / 4).float().mean() > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_read_in_one_pass_are_those_read_one_by_one(shape, form):
    ids, sizes, places = some_ids(1, 33)[0].tolist(), [7, 1, 16, 9], [3, 0, 4, 1]
    texts = [ids[sum(sizes[:n]) : sum(sizes[: n + 1])] for n in range(4)]
    together, alone = (Slots(model(shape), 5, 17) for _ in range(2))
    logits = together.read_texts(places, texts)
    expected = torch.stack([alone.read(*pair) for pair in zip(places, texts, strict=True)])
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert together.lengths == alone.lengths == [1, 9, 0, 7, 16]
    after = [slots.decode(places, [5, 6, 7, 8]) for slots in (together, alone)]
    torch.testing.assert_close(*after, **CLOSE)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), every=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_text_may_be_read_in_pieces(sizes, every):
    ids = some_ids(1, sum(sizes), seed=sum(sizes))
    slots, end = Slots(model(), 1, 72), 0
    with torch.no_grad():
        expected = model()(ids)[0]
    for size in sizes:
        start, end = end, end + size
        logits = slots.read(0, ids[0, start:end].tolist(), every)
        torch.testing.assert_close(
            logits, expected[start:end] if every else expected[end - 1], **CLOSE
        )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copied_beginning_and_a_cropped_end_serve_as_if_read(dtype):
    ids = some_ids(1, 25)[0].tolist()
    slots = Slots(model(), 3, 25, dtype)
    slots.read(0, ids)
    slots.copy(0, 2, 11)
    slots.crop(0, 18)
    assert slots.lengths == [18, 0, 11]
    slots.read(1, ids[:18])
    expected = slots.read(1, ids[18:])
    torch.testing.assert_close(slots.read(0, ids[18:]), expected)
    torch.testing.assert_close(slots.read(2, ids[11:]), expected, **CLOSE)


def test_heads_that_see_near_only_read_near_only():
    # steep slopes and small scores: every head needs fewer than 120 of 1,100 keys
    torch.manual_seed(0)
    config = MPTConfig(d_model=60, n_heads=6, n_layers=2, max_seq_len=64, vocab_size=V)
    near = MPT(config.replace(alibi_bias_max=1.0)).eval()
    for block in near.transformer.blocks:
        block.attn.Wqkv.weight.data[:120] /= 2
    ids = some_ids(1, 1030)[0].tolist()
    slots = Slots(near, 1, 1030)
    assert all(window < 120 for layer in slots._windows() for window in layer)
    slots.read(0, ids[:-1])
    slots.keys[:, :, :, :900] = 1e3  # what lies beyond is not looked at
    logits = slots.decode([0], ids[-1:])[0]
    with torch.no_grad():
        expected = near(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_cache_has_the_size_that_its_shape_says():
    layers, slots, tokens = 3, 4, 50
    each = 2 * layers * slots * tokens * 66
    assert Slots(model(), slots, tokens).bytes == 4 * each
    assert Slots(model(), slots, tokens, "bfloat16").bytes == 2 * each
    scales = 2 * layers * slots * tokens * 6 * 4
    assert Slots(model(), slots, tokens, "int8").bytes == each + scales


@pytest.mark.parametrize("chunk", [41, 400])
def test_a_packed_model_reads_a_long_prompt_as_well_at_its_end(chunk):
    # In bfloat16 where there are units for it, as training computes; distances must not be
    # rounded with the rest.
    torch.manual_seed(1)
    config = MPTConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=V)
    packed, ids = quantize(MPT(config), 16), some_ids(1, 400)[0].tolist()

    def log_probs(dtype, chunk):
        slots = Slots(packed, 1, 400, dtype)
        parts = [slots.read(0, ids[at : at + chunk], every=True) for at in range(0, 400, chunk)]
        return torch.cat(parts).log_softmax(1)

    exact = log_probs("float32", 400)
    with torch.no_grad(), autocast(packed.device):
        trained = packed(torch.tensor([ids]))[0].float().log_softmax(1)
    apart = (log_probs("bfloat16", chunk) - exact).abs().amax(1)
    kept = COARSE["bfloat16"] * exact.abs().max()  # what the cache alone may change
    assert apart.max() < 1.5 * (trained - exact).abs().max() + kept
    assert apart[200:].mean() < 1.2 * apart[:200].mean() + 1e-3


def test_a_bfloat16_model_has_a_bfloat16_cache(form):
    half = MPT(model().config).bfloat16()
    slots = Slots(half, 1, 9)
    assert slots.keys.dtype == torch.bfloat16
    ids = some_ids(1, 9)
    slots.read(0, ids[0, :8].tolist())
    with torch.no_grad():
        expected = half(ids)[0, -1].float()
    logits = slots.decode([0], [int(ids[0, 8])])[0]
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_does_not_fit_is_refused_and_changes_nothing():
    slots = Slots(model(), 2, 8)
    slots.read(0, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="5 tokens and 4 more, but a slot holds 8"):
        slots.read(0, [1, 2, 3, 4])
    slots.read(1, list(range(8)))
    with pytest.raises(ValueError, match="8 tokens and 1 more"):
        slots.decode([0, 1], [1, 2])
    with pytest.raises(ValueError, match="no tokens to read"):
        slots.read(0, [])
    with pytest.raises(ValueError, match="slot 1 holds 8 tokens"):
        slots.read_texts([1], [[1]])
    assert slots.lengths == [5, 8]
    with pytest.raises(ValueError, match="0 slots of 8 tokens"):
        Slots(model(), 0, 8)


def test_writing_takes_as_many_threads_as_pytorch_may_and_leaves_it_so():
    slots = Slots(model(), 2, 9)
    slots.decode([0, 1], [3, 4])
    assert torch.get_num_threads() == 1  # as the whole session has it
    assert numba.get_num_threads() == 1
    torch.set_num_threads(2)
    try:
        slots.decode([0, 1], [3, 4])
        assert torch.get_num_threads() == 2
        assert numba.get_num_threads() == min(2, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(1)
    slots.decode([0, 1], [3, 4])
    assert numba.get_num_threads() == 1


def test_room_that_was_made_in_inference_mode_is_written_to_outside_of_it():
    with torch.inference_mode():
        slots = Slots(model(), 2, 9)
    slots.read(0, [3, 4, 5])
    slots.copy(0, 1, 2)
    assert torch.equal(slots.keys[:, 1, :, :2], slots.keys[:, 0, :, :2])
    assert slots.lengths == [3, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_other_dtypes_are_read_as_what_they_are(dtype):
    # Weights that every dtype holds, so that only their reading can differ.
    exact = copy.deepcopy(model()).half().float()
    slots = Slots(exact, 1, 9), Slots(copy.deepcopy(exact).to(dtype), 1, 9, "float32")
    for each in slots:
        each.read(0, [3, 4, 5])
    one, other = (each.decode([0], [6]) for each in slots)
    torch.testing.assert_close(other, one, atol=2e-2, rtol=0)
