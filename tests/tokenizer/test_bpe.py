"""Learning a vocabulary, and measuring one."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel

from mptbook import wheels
from mptbook.tokenizer.bpe import LONGEST_RUN, PADDING, Fit, measure, train_bpe
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

LAST_WORDS = """
I have seen things you would not believe, and I have told them to the sea; the sea has told
them to the shore. def told(sea):
    if sea.has("shore"):
        return [sea.tell(shore) for shore in sea.shores if shore not in sea.seen]
"""


@pytest.fixture(scope="module")
def trained():
    return train_bpe([LAST_WORDS] * 2, vocab_size=333)


def merges(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.backend.to_str())["model"]["merges"]]


def test_the_vocabulary_has_exactly_the_size_asked_for(trained):
    assert len(trained) == 333
    assert sorted(trained.backend.get_vocab().values()) == list(range(333))


def test_special_tokens_come_first_then_the_bytes_then_merges(trained):
    name = trained.backend.id_to_token
    assert (name(0), name(1)) == (END_OF_TEXT, PADDING)
    assert {name(i) for i in range(2, 258)} == set(ByteLevel.alphabet())
    assert [name(i) for i in range(258, 310)] == ["".join(pair) for pair in merges(trained)]


def test_the_last_ids_are_the_runs_of_spaces_longest_first(trained):
    runs = [trained.decode([i]) for i in range(333 - 23, 333)]
    assert runs == [" " * n for n in range(LONGEST_RUN, 1, -1)]


def test_runs_of_spaces_are_at_the_end_of_gpt_neox_too():
    neox = Tokenizer.gpt_neox()
    assert [neox.decode([i]) for i in range(50_254, 50_277)] == [" " * n for n in range(24, 1, -1)]


def test_learning_twice_gives_the_same_tokenizer(trained):
    assert train_bpe([LAST_WORDS] * 2, vocab_size=333).sha256 == trained.sha256


def test_texts_may_come_from_a_generator(trained):
    assert train_bpe((LAST_WORDS for _ in range(2)), 333).sha256 == trained.sha256


def naive_merges(text, n_merges):
    """BPE as it is written down: count the pairs inside pieces, join the most frequent, repeat."""
    cut = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    pieces = Counter(tuple(piece) for piece, _ in cut)
    age = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    found = []
    for _ in range(n_merges):
        pairs = Counter()
        for piece, times in pieces.items():
            for pair in pairwise(piece):
                pairs[pair] += times
        best = min(pairs, key=lambda p: (-pairs[p], age[p[0]], age[p[1]]))
        found.append(best)
        age.setdefault("".join(best), len(age))
        joined = Counter()
        for piece, times in pieces.items():
            symbols = []
            for symbol in piece:
                if symbols and (symbols[-1], symbol) == best:
                    symbols[-1] += symbol
                else:
                    symbols.append(symbol)
            joined[tuple(symbols)] += times
        pieces = joined
    return found


def test_merges_are_those_of_the_naive_learner(trained):
    assert merges(trained) == naive_merges(LAST_WORDS, 333 - 2 - 256 - 23)


@pytest.mark.parametrize("size", [0, 1, 256, 281])
def test_a_vocabulary_without_room_for_merges_is_refused(size):
    with pytest.raises(ValueError, match=rf"vocab_size is {size}; 281 ids are bytes"):
        train_bpe([LAST_WORDS], vocab_size=size)


def test_a_fit_counts_tokens_bytes_and_lines_by_hand():
    neox = Tokenizer.gpt_neox()
    fit = measure(neox, ["Hello world\n\n", "é\n", ""])
    # 2 tokens and one of two newlines; é and a newline
    assert fit.tokens == len(neox.encode("Hello world\n\n")) + len(neox.encode("é\n"))
    assert (fit.bytes, fit.lines) == (13 + 3, 2)
    assert fit.seconds > 0


def test_rates_are_quotients_of_the_counts():
    fit = Fit(tokens=4, bytes=6_000_000, lines=8, seconds=3.0)
    assert (fit.bytes_per_token, fit.tokens_per_line, fit.megabytes_per_second) == (1.5e6, 0.5, 2.0)


def test_any_object_that_encodes_can_be_measured():
    model = wheels.read("mistral-common", "mistral_common/data/tokenizer.model.v1")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    fit = measure(processor, iter(["Hello world", "again"]))
    assert fit.tokens == len(processor.encode("Hello world")) + len(processor.encode("again"))


@pytest.mark.parametrize("texts", [[], [""], iter([])])
def test_nothing_cannot_be_measured(texts):
    with pytest.raises(ValueError, match="there is no text"):
        measure(Tokenizer.gpt_neox(), texts)
