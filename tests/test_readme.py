"""The README says only what is true."""

import re
from pathlib import Path

from mptbook.__main__ import VERBS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_the_model_knows_the_line(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    *_, last = capsys.readouterr().out.splitlines()
    assert "or not to be, that is the question:" in last


def test_every_command_it_names_exists():
    named = re.findall(r"^mptbook (bench \w+|\w+)", README, re.MULTILINE)
    assert len(named) >= 6
    assert set(named) <= set(VERBS)


def test_every_path_it_names_exists():
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\((book/[\w.]+)\)|`((?:book|mptbook|tests)/[\w./]*)`", README):
        assert (root / "".join(path)).exists(), path
