import json

import datasets
import pytest

from mptbook.bench import storywriter
from mptbook.bench.storywriter import BOOKS, LONG, SHORT, BenchStoryWriter, echoes
from mptbook.data.curriculum import Stage
from mptbook.data.sources import Document, read_source
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain

WORDS = "the hare ran over a hill and far away from here to there with old friends".split()


def novel(n):
    lines = [[WORDS[(n + k * m) % 16] for k in range(13)] for m in range(30)]
    return " ".join(f"Then {' '.join(line)}." for line in lines)


NOVELS = {name: novel(n) for n, name in enumerate([*BOOKS, *map(str, range(120))])}


def recipe(path, **changes):
    values = {
        "shape": {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320},
        "steps": 3,
        "batch_tokens": 64,
        "optim": Optim(lr=1e-3, warmup=1),
    }
    if path.stem != "tiny":
        values["shape"] = {"alibi_bias_max": 16, "clip_qkv": 6}
        values["stages"] = [Stage(tokens=192, row_tokens=64)]
    return Pretrain(**(values | changes))


@pytest.fixture
def small(monkeypatch):
    """A few short novels, and models that train in no time."""

    def read_domain(name, source, stream):
        if source is not None:
            return read_source(source)
        return (Document(*novel) for novel in NOVELS.items())

    columns = {"name": list(NOVELS), "text": list(NOVELS.values())}
    for name, value in {
        "default_domains": lambda: ["novels"],
        "load_domain": lambda *_: datasets.Dataset.from_dict(columns),
        "echoes": lambda texts, *_: echoes(texts, 90, 500),
        "keep_freed_memory": lambda: True,  # of this process
        "ROW_TOKENS": 16,
    }.items():
        monkeypatch.setattr(storywriter, name, value)
    monkeypatch.setattr("mptbook.data.prepare.read_domain", read_domain)
    monkeypatch.setattr(storywriter.Pretrain, "from_toml", recipe)


def test_all_models_read_the_books_that_none_was_trained_on(small, data, tmp_path):
    bench = BenchStoryWriter(
        tokenizer=str(data / "tokenizer.json"),
        home=tmp_path / "home",
        positions=[30, 800],
        tokens=[700, 1000],
        spans=2,
        questions=2,
        new_tokens=3,
        step_tokens=[32, 4096],
        out=tmp_path / "figures.json",
    )
    bench.run()
    figures = json.loads((tmp_path / "figures.json").read_text())
    found = figures["models"]
    assert [model["row_tokens"] for model in found.values()] == [16, 64, 64]
    assert [model["alibi_bias_max"] for model in found.values()] == [8, 13, 16]
    about = json.loads((tmp_path / "home" / "rows" / "data.json").read_text())
    assert about["hold_out"] == [*BOOKS, "echoes.jsonl:0"]
    for model in found.values():
        assert set(model["books"]) == set(BOOKS)
        for book in model["books"].values():
            assert len(book["losses"]) == 2
            assert book["tokens"] > 900
    *asked_for, flatter = found.values()
    assert not any({"book", "key_values"} & set(book) for book in flatter["books"].values())
    for model in asked_for:
        assert all(set(book["book"]) == {"700", "1000"} for book in model["books"].values())
        (asked,) = [book["key_values"] for book in model["books"].values() if "key_values" in book]
        assert set(asked) == {"700", "1000"}
        assert set(asked["700"]) == {"begin", "middle", "end", "unread"}
    assert figures["memory"]["4096"] > 2 * figures["memory"]["32"] > 0
    for line in (tmp_path / "home" / "echoes.jsonl").read_text().splitlines():
        assert "Then" in json.loads(line)["text"]
    again = bench.compare()["models"]
    for name in (SHORT, *LONG):  # nothing is trained twice
        assert again[name]["seconds"] == found[name]["seconds"]


def test_most_lines_of_echoes_stood_there_before_near_and_far():
    texts = ["".join(chr(97 + (n * n + n // 7) % 26) for n in range(40_000))]
    (document,) = echoes(texts, 1, 60_000)
    lines = document.splitlines()
    seen, back = {}, []
    for n, line in enumerate(lines):
        if line in seen:
            back.append(n - seen[line])
        seen[line] = n
    assert len(back) / len(lines) == pytest.approx(0.6, abs=0.06)
    assert sum(n < 10 for n in back) > 0.2 * len(back)
    assert sum(n > 100 for n in back) > 0.05 * len(back)
    assert list(echoes(texts, 2, 500)) == list(echoes(texts, 2, 500))
    assert list(echoes(texts, 1, 500, seed=1)) != list(echoes(texts, 1, 500))
