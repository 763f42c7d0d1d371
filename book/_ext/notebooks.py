"""Notebooks made from the chapters: a book/X.ipynb without outputs for each book/X.md with cells.

    python book/_ext/notebooks.py           write them
    python book/_ext/notebooks.py --check   exit code 1 and a line for each that is out of date

A notebook opens in plain Jupyter, which knows nothing of MyST. So references and citations become
links into the published book, package code becomes text, and admonitions become quotes.
"""

import re
import sys
from pathlib import Path

import jupytext
import nbformat
import yaml
from labels import Book
from lowering import lower
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
FOLDED = {"hide-input", "hide-cell", "remove-input"}

INSTALL = """\
# Installs the package where it is missing, then says what this notebook runs on.
import subprocess
import sys
from pathlib import Path

try:
    import mptbook
except ImportError:
    clone = next((p for p in Path.cwd().parents if (p / "mptbook/__init__.py").exists()), None)
    source = ["-e", str(clone)] if clone else ["mptbook @ git+{url}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *source, "matplotlib"]
    subprocess.run(command, check=True)
    sys.path += [str(clone)] if clone else []

import torch

threads = f"CPU, {{torch.get_num_threads()}} threads"
print(torch.cuda.get_device_name() if torch.cuda.is_available() else threads)"""

# The site fills a value into a sentence with glue; a notebook prints it below the cell instead.
GLUE = """\
def glue(name, value, display=False):
    print(f"{name} = {value}")"""


def install_cell(url):
    """The first cell of every notebook."""
    return INSTALL.format(url=url)


def code_cell(cell, in_solution):
    """The cell without the site's own settings; folded where the site folds it."""
    tags = cell.metadata.get("tags", [])
    metadata = {"tags": list(tags)} if tags else {}
    if in_solution or FOLDED & set(tags):
        metadata["jupyter"] = {"source_hidden": True}  # JupyterLab
        metadata["cellView"] = "form"  # Colab
    source = re.sub(r"^from myst_nb import glue$", GLUE, cell.source, flags=re.MULTILINE)
    return new_code_cell(source, metadata=metadata)


def caption_cell(cell, book, page):
    """The caption of a cell's figure as text, or None where there is none."""
    figure = cell.metadata.get("mystnb", {}).get("figure")
    if not figure or "caption" not in figure:
        return None
    number = book.target(figure["name"]).text if "name" in figure else "Figure"
    return new_markdown_cell(f"*{number}.* {lower(figure['caption'], book, page)}")


def notebook_of(source, book, page):
    """The notebook of a chapter, given its MyST text."""
    cells = [new_code_cell(install_cell(book.url))]
    in_solution = False
    for cell in jupytext.reads(source, "md:myst").cells:
        if cell.cell_type == "markdown":
            in_solution = _still_in_solution(cell.source, in_solution)
            text = lower(cell.source, book, page)
            cells += [new_markdown_cell(text)] if text else []
        elif "remove-cell" not in cell.metadata.get("tags", []):
            caption = caption_cell(cell, book, page)
            cells += [code_cell(cell, in_solution)] + ([caption] if caption else [])
    for i, cell in enumerate(cells):
        cell.id = f"{page}-{i}"  # the same at each export
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return new_notebook(cells=cells, metadata=metadata)


def _still_in_solution(text, before):
    marks = re.findall(r"\{solution-(start|end)\}", text)
    return marks[-1] == "start" if marks else before


def is_notebook(source):
    """Whether a page declares a kernel and so has cells."""
    front = re.match(r"---\n(.*?)\n---\n", source, re.DOTALL)
    return bool(front) and "kernelspec" in yaml.safe_load(front[1])


def exported(root=ROOT):
    """Pairs of a notebook's path and the text that belongs there, for all pages of the book."""
    book = Book.read(root)
    for page in book.pages:
        source = (root / "book" / f"{page}.md").read_text(encoding="utf-8")
        if is_notebook(source):
            notebook = notebook_of(source, book, page)
            yield root / "book" / f"{page}.ipynb", nbformat.writes(notebook) + "\n"


def stale(root=ROOT):
    """The notebooks that are missing or not what their chapter gives."""
    return [
        path
        for path, text in exported(root)
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments):
    """Write all notebooks, or check them with `--check`."""
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments:
        old = stale()
        for path in old:
            print(f"{path.relative_to(ROOT)} is out of date; run: python book/_ext/notebooks.py")
        return 1 if old else 0
    for path, text in exported():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
