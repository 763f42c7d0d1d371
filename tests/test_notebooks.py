"""The notebooks that readers run are what the chapters give, and plain Jupyter runs them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
EXT = ROOT / "book/_ext"


@pytest.fixture(scope="module", autouse=True)
def exporter():
    sys.path.insert(0, str(EXT))
    import notebooks

    yield notebooks
    sys.path.remove(str(EXT))


@pytest.fixture
def small_book(tmp_path):
    """A book of one chapter which uses what chapters use."""
    (tmp_path / "book").mkdir()
    (tmp_path / "mptbook").mkdir()
    (tmp_path / "mptbook/alibi.py").write_text(
        'def slope(h):\n    """Halves."""\n    return 2**-h\n'
    )
    home = {"repository": {"url": "https://example.org/r"}, "html": {"baseurl": "https://b.org"}}
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(home))
    part = {"caption": "One", "numbered": True, "chapters": [{"file": "book/heads"}]}
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump({"root": "book/intro", "parts": [part]}))
    (tmp_path / "book/intro.md").write_text("(ch-intro)=\n# Intro\n")
    (tmp_path / "book/references.bib").write_text(
        "@misc{press2022, author={Press, O. and Smith, N. and Lewis, M.}, title={T}, year=2022}"
    )
    (tmp_path / "book/heads.md").write_text(CHAPTER)
    return tmp_path


CHAPTER = r"""---
kernelspec: {name: python3, display_name: Python 3}
---

(ch-heads)=
# Heads

:::{admonition} In this chapter
See {doc}`intro`.
:::

$$
m = 2^{-h}
$$ (eq-m)

By {eq}`eq-m` {cite:p}`press2022` and {numref}`fig-m`:

```{literalinclude} ../mptbook/alibi.py
:pyobject: slope
```

```{code-cell}
:tags: [remove-cell]
1 / 0  # for the site only
```

```{code-cell}
---
mystnb:
  figure: {name: fig-m, caption: "Slopes."}
---
from myst_nb import glue

glue("m", 0.5, display=False)
```

:::{exercise}
:label: ex-m
Why?
:::

:::{solution-start} ex-m
:class: dropdown
:::

```{code-cell}
assert 2**-1 == 0.5
```

:::{solution-end}
:::
"""


def text_of(notebook, kind="markdown"):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


@pytest.fixture
def notebook(exporter, small_book):
    ((path, text),) = exporter.exported(small_book)
    assert path == small_book / "book/heads.ipynb"
    return nbformat.reads(text, as_version=4)


def test_references_become_links_into_the_published_book(notebook):
    text = text_of(notebook)
    assert "[Intro](https://b.org/book/intro.html)" in text
    assert "[(1.1)](https://b.org/book/heads.html#equation-eq-m)" in text
    assert "([Press et al., 2022](https://b.org/book/bibliography.html))" in text


def test_package_code_is_read_at_export(notebook):
    assert 'From `mptbook/alibi.py`:\n\n```python\ndef slope(h):\n    """Halves.' in text_of(
        notebook
    )


def test_a_solution_gets_a_title_and_its_code_is_folded(notebook):
    titles = [cell.source for cell in notebook.cells if "Solution" in cell.source]
    assert titles == ["**Exercise 1.1.** Why?\n\n### Solution to Exercise 1.1"]
    assert notebook.cells[-1].metadata["jupyter"] == {"source_hidden": True}


def test_a_cell_for_the_site_only_is_left_out(notebook):
    assert "1 / 0" not in text_of(notebook, "code")


def test_a_lowered_notebook_runs_without_the_tools_of_the_site(notebook):
    del notebook.cells[0]  # the install cell, tested with the real notebooks
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert [out.text for out in outputs] == ["m = 0.5\n"]


def test_an_unknown_directive_is_refused_by_name(exporter, small_book):
    chapter = small_book / "book/heads.md"
    chapter.write_text(CHAPTER + "\n:::{hologram}\n:::\n")
    with pytest.raises(ValueError, match=r"heads\.md: .* directive hologram"):
        list(exporter.exported(small_book))


def test_a_stale_notebook_is_noticed(exporter, small_book):
    assert [path.name for path in exporter.stale(small_book)] == ["heads.ipynb"]
    for path, text in exporter.exported(small_book):
        path.write_text(text)
    assert exporter.stale(small_book) == []
    module = small_book / "mptbook/alibi.py"
    module.write_text(module.read_text().replace("Halves", "Halved"))
    assert [path.name for path in exporter.stale(small_book)] == ["heads.ipynb"]


NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_notebooks_of_the_book_are_up_to_date():
    command = [sys.executable, str(EXT / "notebooks.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_notebook
def test_a_notebook_has_no_outputs_and_starts_with_the_install_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# Installs the package where it is missing")
    assert not any(cell.get("outputs") for cell in notebook.cells)


@each_notebook
def test_nothing_of_myst_is_left_in_a_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    prose = re.sub(r"```.*?```", "", text_of(notebook), flags=re.DOTALL)
    assert not re.findall(r":::|\{[\w:-]+\}`|^\([\w-]+\)=$", prose, re.MULTILINE)


@each_notebook
def test_a_notebook_runs_the_code_of_its_chapter(path):
    chapter = jupytext.read(path.with_suffix(".md"), fmt="md:myst")
    kept = [cell for cell in chapter.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    exported = text_of(nbformat.read(path, as_version=4), "code")
    for cell in kept:
        if cell.cell_type == "code" and "myst_nb" not in cell.source:
            assert cell.source in exported


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("MPTBOOK_FAST", "1")
    resources = {"metadata": {"path": str(path.parent)}}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert len(notebook.cells[0].outputs) == 1  # the name of the device, and no warning


def test_the_install_cell_finds_the_clone_that_holds_the_notebook(exporter, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "mptbook", tmp_path / "mptbook")
    (tmp_path / "book").mkdir()
    monkeypatch.chdir(tmp_path / "book")
    monkeypatch.setitem(sys.modules, "mptbook", None)  # as if it were not installed
    monkeypatch.setattr(sys, "path", [*sys.path])
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.extend(command))
    exec(exporter.install_cell("https://example.org/r"), {})
    assert ["-e", str(tmp_path)] == ran[5:7]
