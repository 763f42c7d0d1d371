"""Log-likelihoods with what is shared read once equal those of every row read by itself."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny_readers import PEERS, mpt_directory, mpt_reader, peer_reader

from mptbook.eval.prefix import Prefix, common_begin
from mptbook.eval.reader import load_reader
from mptbook.eval.score import (
    Context,
    _batches,
    continuations,
    likelihoods,
)

SHOTS = "the cat sat on the mat. yes\n\n"
CONTEXTS = ["A dog", "A dog ate the hat of the cat", "", "the mat. A cat sat", "1 2 3 4 5 6 7"]
OPTIONS = [" yes", " no", " the hat of the cat?", " 9", " A dog sat on the mat. A"]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {kind: peer_reader(kind) for kind in PEERS}
    learned, shared_heads = {"alibi": False}, {"attn_type": "multiquery_attention"}
    for name, changes in {"mpt": {}, "mpt-learned": learned, "mpt-mqa": shared_heads}.items():
        made[name] = mpt_reader(folder / name, **changes)
    return made


def pairs_of(reader):
    pairs = itertools.product(CONTEXTS, OPTIONS)
    return [reader.pair(SHOTS + context, option) for context, option in pairs]


def by_hand(reader, context, continuation):
    """One row, no padding, no mask, no cache."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = reader.model(input_ids=ids[:, :-1], use_cache=False).logits
    logits = logits[0, -len(continuation) :]
    nats = -F.cross_entropy(logits, torch.tensor(continuation), reduction="sum").item()
    return nats, logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("kind", [*PEERS, "mpt", "mpt-learned", "mpt-mqa"])
@pytest.mark.parametrize(("share", "batch_tokens"), [(True, 4096), (True, 150), (False, 4096)])
def test_likelihoods_equal_those_of_rows_read_alone(readers, kind, share, batch_tokens):
    reader = readers[kind]
    pairs = pairs_of(reader)
    found = likelihoods(reader, pairs, share=share, batch_tokens=batch_tokens)
    for one, pair in zip(found, pairs, strict=True):
        nats, greedy = by_hand(reader, *pair)
        assert one.nats == pytest.approx(nats, abs=2e-4, rel=1e-5)
        assert (one.greedy, one.tokens) == (greedy, len(pair[1]))


def test_contexts_with_nothing_in_common_are_scored_too(readers):
    reader = readers["mpt"]
    pairs = [reader.pair(context, " the hat") for context in ("A dog", "9", "yes no yes no")]
    assert common_begin([context for context, _ in pairs]) == 0
    for one, pair in zip(likelihoods(reader, pairs), pairs, strict=True):
        assert one.nats == pytest.approx(by_hand(reader, *pair)[0], abs=2e-4)


def test_what_is_shared_is_read_once(readers, monkeypatch):
    reader = readers["mpt"]
    read = []
    ask = reader.logits

    def counted(ids, mask, cache, keep):
        read.append(ids.numel())
        return ask(ids, mask, cache, keep)

    monkeypatch.setattr(reader, "logits", counted)
    shots = SHOTS * 3
    pairs = [reader.pair(shots + context, option) for context in CONTEXTS[:2] for option in OPTIONS]
    likelihoods(reader, pairs, share=False)
    apart, read[:] = sum(read), []
    likelihoods(reader, pairs, batch_tokens=300)  # several batches, one prefix
    contexts = [len(reader.encode(shots + context)) for context in CONTEXTS[:2]]
    options = 2 * len(OPTIONS) * max(len(option) for _, option in pairs)
    assert sum(read) <= sum(contexts) + options
    assert apart > 3 * sum(read)


def test_a_prefix_is_spread_behind_the_padding(readers):
    reader = readers["mpt"]
    contexts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8]]
    ids, mask, cache = Prefix(reader).spread(contexts)
    # All begin with four tokens; three of the second row's were moved out, and are read again.
    assert ids.tolist() == [[9, 10, 11], [6, 7, 8]]
    assert mask.sum(1).tolist() == [7, 4]
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(cache.layers[1].keys[1, :, 3], cache.layers[1].keys[0, :, 0])


def test_of_equal_contexts_one_token_is_still_read(readers):
    ids, _, cache = Prefix(readers["mpt"]).spread([[5, 6, 7], [5, 6, 7]])
    assert (ids.tolist(), cache.get_seq_length()) == ([[7], [7]], 2)


def test_a_context_that_is_too_long_loses_its_begin_and_this_is_told(readers, tmp_path):
    reader = load_reader(mpt_directory(tmp_path / "model"), precision="fp32", max_tokens=8)
    context, option = reader.pair(SHOTS, " yes")
    long, short = likelihoods(reader, [(context, option), (context[-3:], option)])
    assert (long.truncated, short.truncated) == (True, False)
    kept = context[-(8 + 1 - len(option)) :]
    assert long.nats == pytest.approx(by_hand(reader, kept, option)[0], abs=1e-4)


def test_the_batches_hold_all_contexts_and_no_more_tokens_than_allowed():
    lengths = [40, 33, 33, 20, 9, 9, 2]
    contexts = [Context([1] * n, [[1] * 3, [1] * 5]) for n in lengths]
    batches = list(_batches(contexts, 160))
    assert [len(one.ids) for batch in batches for one in batch] == lengths
    for batch in batches:
        rows, width = 2 * len(batch), len(batch[0].ids) + 5
        assert rows * width <= 160
    assert len(batches) == 4


def test_a_context_of_many_continuations_is_scored_in_parts(readers, monkeypatch):
    reader = readers["mpt"]
    pairs = [reader.pair("", "the cat sat on the mat"[: 4 + n]) for n in range(17)]
    widest, ask = [], reader.logits

    def watched(ids, mask, cache, keep):
        widest.append(mask.numel())
        return ask(ids, mask, cache, keep)

    monkeypatch.setattr(reader, "logits", watched)
    found = likelihoods(reader, pairs, batch_tokens=40)
    assert max(widest) <= 40
    for one, pair in zip(found, pairs, strict=True):
        assert one.nats == pytest.approx(by_hand(reader, *pair)[0], abs=1e-4)


def test_continuations_of_one_token_need_no_rows_of_their_own():
    contexts = [Context([1] * 9, [[1], [2], [3], [4]]) for _ in range(6)]
    assert [len(batch) for batch in _batches(contexts, 30)] == [3, 3]


def test_an_empty_continuation_is_refused(readers):
    with pytest.raises(ValueError, match="pair 1 has an empty context or continuation"):
        likelihoods(readers["mpt"], [([1], [2]), ([1], [])])


def test_pairs_are_split_as_one_text_is_tokenised(readers):
    reader = readers["mpt"]
    context, after = reader.pair("the cat ", "sat")  # the blank belongs to the word
    assert context == reader.encode("the cat")
    assert context + after == reader.encode("the cat sat")
    start, alone = reader.pair("", "the cat")
    assert (start, alone) == ([reader.start], reader.encode("the cat"))


@pytest.mark.parametrize("kind", [*PEERS, "mpt", "mpt-learned"])
def test_what_is_written_is_the_likeliest_token_again_and_again(readers, kind):
    reader = readers[kind]
    prompts = [SHOTS + context for context in CONTEXTS]
    found = continuations(reader, prompts, max_new_tokens=6, stop=("\n", "?"), batch_tokens=120)
    for prompt, text in zip(prompts, found, strict=True):
        ids = reader.encode(prompt)
        for _ in range(6):
            with torch.no_grad():
                token = int(reader.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in reader.ends:
                break
            ids.append(token)
        whole = reader.decode(ids[len(reader.encode(prompt)) :])
        assert text == whole.split("\n")[0].split("?")[0]


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"cannot be loaded|Unrecognized"):
        load_reader(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_reader(tmp_path / "nothing")
