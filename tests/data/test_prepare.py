import json
import os

import numpy as np
import pytest

from mptbook.data.corpora import held_out
from mptbook.data.loader import Rows, batches, row_numbers
from mptbook.data.packing import IGNORE
from mptbook.data.prepare import Prepare, prepare
from mptbook.data.sources import read_source
from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.heldout import load_heldout


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


def shorten(shard):
    shard.write_bytes(shard.read_bytes()[:-1000])


def flip(shard):
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (os.remove, r"has \d+ of the \d+ rows of hares; run the same mptbook prepare again"),
        (shorten, r"hares-00001\.arrow is damaged .*; run the same mptbook prepare again"),
        (flip, None),  # found by its digest only, which loading does not compute
    ],
)
def test_the_same_command_mends_a_damaged_shard_and_leaves_the_others(
    texts, tmp_path, harm, seen, capsys
):
    prepare(settings(texts, tmp_path / "rows"))
    shards = sorted((tmp_path / "rows" / "train").glob("*.arrow"))
    whole = {shard: shard.read_bytes() for shard in shards}
    before = shards[0].stat().st_mtime_ns
    harm(shards[1])
    if seen:
        with pytest.raises(ValueError, match=seen):
            Rows(tmp_path / "rows")
    prepare(settings(texts, tmp_path / "rows"))
    assert {shard: shard.read_bytes() for shard in shards} == whole
    assert shards[0].stat().st_mtime_ns == before
    named = harm is not os.remove
    assert ("hares-00001.arrow is damaged, and written again" in capsys.readouterr().out) is named


def test_damaged_held_out_texts_are_named_and_mended(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    held_out_texts = load_heldout(tmp_path / "rows")
    shorten(tmp_path / "rows" / "heldout" / "hares.arrow")
    with pytest.raises(ValueError, match=r"hares\.arrow is damaged .*; run the same"):
        load_heldout(tmp_path / "rows")
    prepare(settings(texts, tmp_path / "rows"))
    assert load_heldout(tmp_path / "rows") == held_out_texts


def test_other_settings_on_the_same_folder_are_refused(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    with pytest.raises(ValueError, match="prepared with row_tokens 31, not 32"):
        prepare(settings(texts, tmp_path / "rows", row_tokens=32))


def test_a_text_that_could_not_be_read_can_be_mended(texts, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("broken\n")
    with pytest.raises(ValueError, match="line 1, is not JSON"):
        prepare(settings(texts, tmp_path / "rows", source={"hares": str(file)}))
    file.write_text((texts / "hares.jsonl").read_text())
    assert prepare(settings(texts, tmp_path / "rows", source={"hares": str(file)}))["hares"].rows


@pytest.mark.parametrize("name", ["", "../hares", "a/b", ".hares", "a\\b"])
def test_a_domain_that_is_no_name_of_a_file_is_refused(texts, tmp_path, name):
    source = {name: str(texts / "hares.jsonl")}
    with pytest.raises(ValueError, match="begin it with a letter, without / or"):
        prepare(settings(texts, tmp_path / "rows", source=source))
    assert not (tmp_path / "rows").exists()


def test_a_folder_of_something_else_is_left_alone(texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        prepare(settings(texts, tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_too_little_text_is_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="it needs more text"):
        prepare(settings(texts, tmp_path / "rows", max_documents=1))


def test_each_epoch_sees_every_row_once_in_another_order():
    steps = [row_numbers({"a": range(20), "b": range(20, 35)}, 5, (3,), step) for step in range(14)]
    first, second = np.concatenate(steps[:7]), np.concatenate(steps[7:])
    assert sorted(first) == sorted(second) == list(range(35))
    assert (first != second).any()


def test_a_batch_may_lie_across_two_epochs():
    numbers = np.concatenate([row_numbers({"a": range(7)}, 5, (3,), step) for step in range(7)])
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


def test_targets_are_the_next_tokens(texts, tmp_path):
    prepare(settings(texts, tmp_path / "rows"))
    inputs, targets = next(batches(Rows(tmp_path / "rows"), 3, seed=1))
    assert (inputs[:, 1:] == targets[:, :-1]).all()


@pytest.mark.parametrize("packing", ["cut", "whole"])
def test_documents_are_told_apart_and_their_first_tokens_cost_nothing(texts, tmp_path, packing):
    prepare(settings(texts, tmp_path / "rows", packing=packing, row_tokens=40))
    inputs, targets, documents = next(batches(Rows(tmp_path / "rows"), 3, seed=1, end_of_text=0))
    assert (documents[:, 1:] - documents[:, :-1] == (inputs[:, :-1] == 0).long()).all()
    assert ((targets == IGNORE) == (inputs == 0)).all()
    told = targets[:, :-1] != IGNORE
    assert (targets[:, :-1][told] == inputs[:, 1:][told]).all()


def test_whole_documents_are_counted_with_their_filling(texts, tmp_path):
    counts = prepare(settings(texts, tmp_path / "rows", packing="whole", row_tokens=40))["hares"]
    rows = Rows(tmp_path / "rows")
    ids = rows[np.arange(len(rows))]
    ended = ids == 0
    trailing = sum(max(0, list(row[::-1]).index(False) - 1) for row in ended)
    assert (counts.rows, counts.filling) == (len(rows), trailing)
    assert 0 < counts.filling < ids.size / 4
    with pytest.raises(ValueError, match="hold documents whole and cannot be joined to 80 tokens"):
        Rows(tmp_path / "rows", 80)
    with pytest.raises(ValueError, match="prepared with packing 'whole', not 'cut'"):
        prepare(settings(texts, tmp_path / "rows", row_tokens=40))


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


def test_documents_held_out_whole_are_not_for_training(texts, tmp_path):
    whole = settings(texts, tmp_path / "rows", hold_out=["hares.jsonl:7", "hares.jsonl:12"])
    prepare(whole)
    plain = prepare(settings(texts, tmp_path / "plain"))["hares"]
    held = load_heldout(tmp_path / "rows")["hares"]
    assert "The 7th hare ran 49 miles.\n" * 2 in held
    assert len(held) == len(load_heldout(tmp_path / "plain")["hares"]) + 2
    about = json.loads((tmp_path / "rows" / "data.json").read_text())
    assert about["domains"]["hares"]["train_bytes"] < plain.train_bytes


def test_a_name_to_hold_out_that_no_document_has_is_an_error(texts, tmp_path):
    message = r"no document has this name \(did you mean 'hares.jsonl:"
    with pytest.raises(ValueError, match=message):
        prepare(settings(texts, tmp_path / "rows", hold_out=["hare.jsonl:77777"]))
    with pytest.raises(ValueError, match="half prepared"):
        Rows(tmp_path / "rows")


def test_near_copies_are_dropped_and_reported(texts, tmp_path, capsys):
    lines = (texts / "hares.jsonl").read_text().splitlines()
    (tmp_path / "twice.jsonl").write_text("\n".join(lines + lines[:40]))
    source = {"hares": str(tmp_path / "twice.jsonl")}
    settings(texts, tmp_path / "rows", source=source, near_copies=0.8).run()
    found = json.loads((tmp_path / "rows" / "data.json").read_text())["domains"]["hares"]
    assert (found["documents"], found["dropped"]) == (230, {"near copy": 40})
    assert "dropped: 40 documents, near copy" in capsys.readouterr().out


def test_what_is_no_prose_is_dropped_where_it_is_asked_for(texts, tmp_path):
    with pytest.raises(ValueError, match=r"hares: 0 documents gave 0 rows .* it needs more text"):
        prepare(settings(texts, tmp_path / "rows", filtered=["hares"]))  # all are too short
    with pytest.raises(ValueError, match="filtered has 'foxes'; the domains are hares"):
        prepare(settings(texts, tmp_path / "other", filtered=["foxes"]))
    assert not (tmp_path / "other").exists()
