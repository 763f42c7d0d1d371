import json

import pytest
import torch
import torch.nn.functional as F

from mptbook import save_model
from mptbook.__main__ import main
from mptbook.eval import longcontext
from mptbook.eval.longcontext import chosen, loss_by_position
from mptbook.eval.recall import book_question, key_values
from mptbook.infer.cache import KVCache
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

WORDS = "the hare ran over a hill and far away from here to there with old friends".split()
SENTENCES = [
    f"Then {' '.join(WORDS[(n * k) % 16] for k in range(1, 14))} {n}." for n in range(1, 200)
]
BOOK = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([BOOK], 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=320, max_seq_len=16)
    return MPT(config)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(longcontext, "AT_ONCE", 7)


def token_losses(model, ids):
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    return F.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("span", [1, 9])
def test_the_same_tokens_are_predicted_with_more_and_more_before_them(model, tokenizer, span):
    ids = tokenizer.encode(BOOK)[:101]
    how = {"spans": 3, "span_tokens": span, "precision": "fp32"}
    found = loss_by_position(model, ids, [1, 5, 21], **how)
    begins = [round(21 + (101 - span - 21) * part - 0.01) for part in (0, 0.5, 1)]
    for position, mean in zip([1, 5, 21], found, strict=True):
        rows = [ids[n - position : n + span] for n in begins]
        expected = torch.cat([token_losses(model, row)[-span:] for row in rows]).mean()
        assert mean == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("positions", "message"),
    [([3, 0], "a position is 0; take at least 1"), ([2, 52], "needs 61 tokens, the text has 60")],
)
def test_positions_that_the_text_does_not_have_are_refused(model, tokenizer, positions, message):
    ids = tokenizer.encode(BOOK)[:60]
    with pytest.raises(ValueError, match=message):
        loss_by_position(model, ids, positions, span_tokens=9)


def test_the_option_of_the_least_loss_per_token_is_chosen(model, tokenizer):
    choices = [key_values(tokenizer, 80, place, seed) for seed in range(3) for place in (0, 0.5, 1)]
    expected = []
    for choice in choices:
        before = tokenizer.encode(choice.context) + tokenizer.encode(choice.question)
        answers = [tokenizer.encode(option) for option in choice.options]
        means = [token_losses(model, before + a)[-len(a) :].mean().item() for a in answers]
        expected.append(means.index(min(means)))
    assert chosen(model, tokenizer, choices, precision="fp32") == expected
    assert len(set(expected)) > 1


def test_a_shared_context_is_read_once(model, tokenizer, monkeypatch):
    one, other = (book_question(BOOK, tokenizer, 600, 0.5, seed) for seed in (1, 2))
    assert one.context == other.context
    read = []
    forward = MPT.forward
    monkeypatch.setattr(
        MPT,
        "forward",
        lambda self, ids, **how: (read.append(ids.shape[1]), forward(self, ids, **how))[1],
    )
    chosen(model, tokenizer, [one, other])
    twice = sum(read)
    read.clear()
    chosen(model, tokenizer, [one])
    assert twice - sum(read) < 600


def test_a_pair_is_asked_for_where_it_stands(tokenizer):
    for place, part in ((0.0, 0.05), (0.5, 0.55), (1.0, 1.0)):
        choice = key_values(tokenizer, 500, place, seed=4)
        lines = choice.context.splitlines()
        asked = [n for n, line in enumerate(lines) if line.startswith(choice.question)]
        assert asked == [round(place * (len(lines) - 1))]
        assert choice.context.index(choice.question) <= part * len(choice.context)
        assert lines[asked[0]] + "\n" == choice.question + choice.options[choice.right]
        assert all(option in choice.context for option in choice.options)
        assert len(set(choice.options)) == 4
        assert 0.8 * 500 < len(tokenizer.encode(choice.context)) < 1.25 * 500
    assert key_values(tokenizer, 500, 0.5, seed=4) == key_values(tokenizer, 500, 0.5, seed=4)


def test_each_name_stands_once_in_a_list(tokenizer, monkeypatch):
    monkeypatch.setattr("mptbook.eval.recall.random_name", lambda source: str(source.randrange(60)))
    choice = key_values(tokenizer, 600, 0.5, seed=1)
    names = [line.split()[3] for line in choice.context.splitlines()]
    assert len(set(names)) == len(names) > 10
    assert len(set(choice.options)) == 4


def test_a_sentence_of_the_book_is_asked_for_where_it_stands(tokenizer):
    starts = []
    for place in (0.1, 0.5, 0.9):
        choice = book_question(BOOK, tokenizer, 1500, place, seed=5)
        sentence = choice.question.strip() + choice.options[choice.right]
        assert sentence in SENTENCES
        starts.append(choice.context.index(sentence) / len(choice.context))
        halves = [option.strip() for option in choice.options]
        assert all(any(s.endswith(half) for s in SENTENCES) for half in halves)
    assert starts == pytest.approx([0.1, 0.5, 0.9], abs=0.1)


def test_a_book_that_is_too_short_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"the book has \d+ tokens, 100000 are asked for"):
        book_question(BOOK, tokenizer, 100_000, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"\d sentences of 12 to 40 words .* 8 are needed"):
        book_question(BOOK, tokenizer, 100, 0.5, seed=0)


def test_a_cropped_cache_goes_on_as_if_nothing_had_come_after(model, tokenizer):
    ids = torch.tensor([tokenizer.encode(BOOK)[:30]])
    cache = KVCache(2, room=4)
    with torch.no_grad():
        model(ids[:, :11], cache=cache)
        expected = model(ids[:, 11:20], cache=cache)
        cache.crop(11)
        model(ids[:, 5:19], cache=cache)
        cache.crop(11)
        again = model(ids[:, 11:20], cache=cache)
    assert len(cache) == 20
    torch.testing.assert_close(again, expected)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path


def test_the_command_measures_every_length_and_place(folder, model, tokenizer, capsys):
    lengths = "--positions", "1,600", "--spans", "3", "--tokens", "600,1200"
    out = folder / "figures.json"
    how = "--questions", "3", "--precision", "fp32", "--out", str(out)
    words = ["longcontext", str(folder / "model"), "--book", str(folder / "book.txt")]
    assert main([*words, *lengths, *how]) == 0
    found = json.loads(out.read_text())
    ids = tokenizer.encode(BOOK)
    expected = loss_by_position(model, ids, [1, 600], spans=3, precision="fp32")
    assert found["losses"] == pytest.approx(expected)
    questions = [book_question(BOOK, tokenizer, 1200, 0.5, seed) for seed in range(3)]
    answers = chosen(model, tokenizer, questions, precision="fp32")
    right = sum(a == q.right for a, q in zip(answers, questions, strict=True)) / 3
    assert found["book"]["1200"]["middle"] == pytest.approx(right)
    assert set(found["key_values"]) == {"600", "1200"}
    assert "nats per token of 3 spans" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--book": "nowhere.txt"}, "nowhere.txt"),
        ({"--positions": "999999"}, "behind position 999999 needs"),
        ({"--spans": "0"}, "spans='0': input should be greater"),
        ({"--out": __file__}, "is there already and holds no figures; choose another --out"),
    ],
)
def test_a_mistake_is_one_line(folder, changes, message, capsys):
    given = {"--book": str(folder / "book.txt"), "--positions": "300", "--tokens": "300"} | changes
    words = ["longcontext", str(folder / "model"), *[w for pair in given.items() for w in pair]]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
