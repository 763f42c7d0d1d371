import json

import pytest

from mptbook.bench import tokenizer as bench
from mptbook.bench.peers import OURS
from mptbook.bench.tokenizer import (
    BenchTokenizer,
    agree,
    compare,
    decoders,
    encoders,
    rates,
)
from mptbook.tokenizer.bpe import train_bpe

TEXTS = ["Call me Ishmael.\n", "    if x:\n        return 'é'", "some <|padding|>\t words  here"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, vocab_size=301)


@pytest.fixture
def file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_everyone_gives_the_same_ids_and_the_same_text(tokenizer, file):
    plain = [text.replace("<|padding|>", "") for text in TEXTS]
    ids = tokenizer.encode_batch(plain)
    agree(encoders(tokenizer, file), plain, ids)
    agree(decoders(tokenizer, file), ids, plain)  # a round trip


def test_different_ids_are_not_timed(tokenizer):
    with pytest.raises(ValueError, match="tokenizers does not agree with mptbook on text 2; "):
        compare(tokenizer, TEXTS, repeats=1)  # a special token that is spelled out


def test_one_that_gives_fewer_texts_does_not_agree():
    with pytest.raises(ValueError, match="longer"):
        agree({"short": lambda given: given[:1]}, [[1], [2]], [[1], [2]])


def test_rates_are_those_counted_by_hand():
    found = rates({OURS: [4.0, 2.0, 3.0], "other": [1.0, 1.0, 1.0]}, n_bytes=6_000_000)
    assert found[OURS]["megabytes_per_second"] == 2.0
    assert found["other"]["megabytes_per_second"] == 6.0
    assert [one["times_mptbook"] for one in found.values()] == [1.0, 1 / 3]
    assert found[OURS]["noise"] == pytest.approx(0.5 / 3)
    assert found["other"]["noise"] == 0.0


def test_the_bench_writes_every_figure(tokenizer, file, tmp_path, monkeypatch, capsys):
    texts = [TEXTS[0], TEXTS[1]]
    monkeypatch.setattr(bench, "heldout_texts", lambda: texts)
    out = tmp_path / "figures.json"
    BenchTokenizer(tokenizer=str(file), repeats=2, out=out).run()
    found = json.loads(out.read_text())
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["ids"] == 301
    assert found["encode"].keys() == encoders(tokenizer, file).keys()
    assert found["decode"].keys() == decoders(tokenizer, file).keys()
    for one in [*found["encode"].values(), *found["decode"].values()]:
        assert len(one["seconds"]) == 2
        assert one["megabytes_per_second"] > 0
    assert "tokenizers, without offsets" in capsys.readouterr().out
