import json
import os

import numpy as np
import pytest

from mptbook.data.corpora import held_out
from mptbook.data.loader import Rows, batches, row_numbers
from mptbook.data.prepare import Prepare, prepare
from mptbook.data.sources import read_source
from mptbook.tokenizer.bpe import train_bpe


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with enough short documents that some are held out, and a tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [{"text": f"The {n}th hare ran {n * n} miles.\n" * (1 + n % 3)} for n in range(230)]
    (folder / "hares.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_bpe([line["text"] for line in lines], 300).save(folder / "tokenizer.json")
    return folder


def settings(texts, out, **changes):
    values = {
        "out": out,
        "tokenizer": str(texts / "tokenizer.json"),
        "row_tokens": 31,
        "source": {"hares": str(texts / "hares.jsonl")},
        "shard_documents": 100,
    }
    return Prepare(**(values | changes))


def test_rows_are_the_training_documents_in_order(texts, tmp_path):
    from mptbook.tokenizer.tokenizer import Tokenizer

    prepare(settings(texts, tmp_path / "rows", shard_documents=1000))
    rows = Rows(tmp_path / "rows")
    stream = rows[np.arange(len(rows))][:, :-1].flatten().tolist()
    tokenizer = Tokenizer.load(texts)
    train = [held_out(doc)[0] for doc in read_source(str(texts / "hares.jsonl"))]
    expected = [i for t in train if t for i in [*tokenizer.encode(t), tokenizer.end_of_text]]
    assert stream == expected[: len(stream)]
    assert len(expected) - len(stream) <= 31 + 1


def test_a_restart_keeps_finished_shards_and_ends_alike(texts, tmp_path):
    first = prepare(settings(texts, tmp_path / "a"))
    prepare(settings(texts, tmp_path / "b"))
    kept, lost = sorted((tmp_path / "b" / "train").glob("*.arrow"))[:2]
    before = kept.stat().st_mtime_ns
    os.remove(lost)
    note = tmp_path / "b" / "data.json"
    about = json.loads(note.read_text())
    about.pop("domains")  # as a killed run leaves it
    note.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="half prepared"):
        Rows(tmp_path / "b")
    assert prepare(settings(texts, tmp_path / "b")) == first
    assert kept.stat().st_mtime_ns == before
    a, b = Rows(tmp_path / "a"), Rows(tmp_path / "b")
    assert (a[np.arange(len(a))] == b[np.arange(len(b))]).all()


def test_other_settings_on_the_same_folder_are_refused(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    with pytest.raises(ValueError, match="prepared with row_tokens 31, not 32"):
        prepare(settings(texts, tmp_path / "rows", row_tokens=32))


def test_a_folder_of_something_else_is_left_alone(texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        prepare(settings(texts, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_too_little_text_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="it needs more text"):
        prepare(settings(texts, tmp_path / "rows", max_documents=1))


def test_each_epoch_sees_every_row_once_in_another_order():
    steps = [row_numbers(35, 5, seed=3, step=step) for step in range(14)]
    first, second = np.concatenate(steps[:7]), np.concatenate(steps[7:])
    assert sorted(first) == sorted(second) == list(range(35))
    assert (first != second).any()


def test_a_batch_may_lie_across_two_epochs():
    numbers = np.concatenate([row_numbers(7, 5, seed=3, step=step) for step in range(7)])
    assert sorted(numbers) == sorted([*range(7)] * 5)


def test_the_batch_of_a_step_depends_on_seed_and_step_alone(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    rows = Rows(tmp_path / "rows")
    stream = batches(rows, 4, seed=1)
    early = [next(stream) for _ in range(6)]
    resumed = next(batches(rows, 4, seed=1, start=5))
    assert (resumed[0] == early[5][0]).all()
    assert (next(batches(rows, 4, seed=2))[0] != early[0][0]).any()


def test_processes_share_the_batch_of_one(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    rows = Rows(tmp_path / "rows")
    whole, _ = next(batches(rows, 6, seed=1))
    parts = [next(batches(rows, 6, seed=1, rank=rank, world=3))[0] for rank in range(3)]
    assert sorted(row.tolist() for part in parts for row in part) == sorted(whole.tolist())


def test_rows_that_do_not_split_over_the_processes_are_refused(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    with pytest.raises(ValueError, match="7 rows do not split over 2 processes"):
        next(batches(Rows(tmp_path / "rows"), 7, seed=1, world=2))


def test_targets_are_the_next_tokens_and_documents_are_told_apart(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    inputs, targets, documents = next(batches(Rows(tmp_path / "rows"), 3, seed=1, end_of_text=0))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert documents.max() == (inputs[:, :-1] == 0).sum(dim=1).max()


def test_a_folder_that_was_never_prepared_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not prepared; run: mptbook prepare"):
        Rows(tmp_path)


def test_a_source_that_is_not_there_is_found_before_anything_is_written(texts, tmp_path):
    missing = {"hares": str(texts / "hares.jsonl"), "foxes": "nowhere/"}
    with pytest.raises(FileNotFoundError, match="nowhere/ does not exist; give a path, or hf:"):
        prepare(settings(texts, tmp_path / "rows", source=missing))
    assert not (tmp_path / "rows").exists()


def test_shards_of_texts_that_have_changed_are_not_kept(texts, tmp_path):
    source = tmp_path / "hares.jsonl"
    source.write_text((texts / "hares.jsonl").read_text())
    prepare(settings(texts, tmp_path / "rows", source={"hares": str(source)}))
    source.write_text(source.read_text() + '\n{"text": "one more"}')
    with pytest.raises(ValueError, match="was prepared with texts"):
        prepare(settings(texts, tmp_path / "rows", source={"hares": str(source)}))
