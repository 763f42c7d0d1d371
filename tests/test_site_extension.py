"""The book's Sphinx extension: when results are computed anew, and how docstrings are read."""

import sys
from pathlib import Path

import pytest

EXT = Path(__file__).parents[1] / "book/_ext"


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.syspath_prepend(str(EXT))
    import mptbook_site

    yield mptbook_site
    del sys.modules["mptbook_site"]


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "mptbook/configs").mkdir(parents=True)
    (tmp_path / "mptbook/alibi.py").write_text("a = 1\n")
    (tmp_path / "mptbook/configs/tiny.toml").write_text("steps = 3\n")
    return tmp_path


@pytest.mark.parametrize("file", ["alibi.py", "configs/tiny.toml"])
def test_a_change_of_the_package_gives_other_results_and_undoing_it_the_same(extension, tree, file):
    before = extension.results_key(tree)
    changed = tree / "mptbook" / file
    old = changed.read_text()
    changed.write_text(old + "# more\n")
    assert extension.results_key(tree) != before
    changed.write_text(old)
    assert extension.results_key(tree) == before


def test_fast_mode_and_another_torch_have_results_of_their_own(extension, tree, monkeypatch):
    monkeypatch.delenv("MPTBOOK_FAST", raising=False)
    keys = [extension.results_key(tree)]
    monkeypatch.setenv("MPTBOOK_FAST", "1")
    keys.append(extension.results_key(tree))
    monkeypatch.setattr(extension, "version", lambda library: "0.0")
    keys.append(extension.results_key(tree))
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("plain", "rst"),
    [
        ("the mask of `x_` and ``y``", "the mask of ``x_`` and ``y``"),
        ("|q| times |k|", r"\|q\| times \|k\|"),
        ("passes *args and **kwargs on", r"passes \*args and \**kwargs on"),
        ("n_heads and 3 * 4", "n_heads and 3 * 4"),
    ],
)
def test_marks_of_another_language_are_escaped(extension, plain, rst):
    assert extension.as_rst(plain) == rst


def test_a_dimension_key_is_kept_line_by_line(extension):
    lines = ["Bias.", "", "Dimensions in this file", "    H   heads", "    Tq  queries", "", "End."]
    extension.read_docstring(None, "module", "m", None, {}, lines)
    assert lines[2:6] == ["Dimensions in this file::", "", "    H   heads", "    Tq  queries"]


def test_equal_inline_scripts_stand_once(extension):
    class Script:
        def __init__(self, body=None):
            self.attributes = {"body": body} if body else {}

    a, b, file, other = Script("let x"), Script("let x"), Script(), Script()
    context = {"script_files": [a, file, b, other]}
    extension.drop_repeated_scripts(None, "page", "page.html", context, None)
    assert context["script_files"] == [a, file, other]
