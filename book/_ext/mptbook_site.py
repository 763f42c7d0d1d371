"""Sphinx extension of the book: what jupyter-book 1.x needs so that pages are true and complete.

Each function deals with one trap and says which.
"""

import hashlib
import importlib.util
import os
import re
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from labels import cited_as
from notebooks import exported
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style as PlainStyle
from pybtex.style.labels import BaseLabelStyle

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "matplotlib")


def installed(library):
    """The installed version of a library, or "absent"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def results_key(root=ROOT):
    """A short hash of what the output of a chapter depends on, apart from its own cells."""
    digest = hashlib.sha256()
    sources = [*root.glob("mptbook/**/*.py"), *root.glob("mptbook/configs/**/*.toml")]
    recorded = (path for path in root.glob("book/_data/**/*") if path.is_file())
    for path in sorted([*sources, *recorded]):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    for library in LIBRARIES:
        digest.update(f"{library} {installed(library)}\n".encode())
    digest.update(os.environ.get("MPTBOOK_FAST", "").encode())
    return digest.hexdigest()[:16]


def choose_cache(app, config):
    """Give each state of the package its own execution cache.

    Trap: jupyter-cache knows a notebook by its cells alone, so after a change to the package a
    page keeps its old numbers. With one folder per state a change re-runs the chapters, and
    changing it back finds their results again. `mptbook_results` makes Sphinx re-read the pages.
    """
    config.mptbook_results = results_key()
    caches = Path(app.outdir).parent / ".jupyter_cache"
    config.nb_execution_cache_path = str(caches / config.mptbook_results)


def run_this_tree(app, config):
    """Make kernels and autodoc import the package that lies beside the book.

    Trap: a kernel starts in book/, where `import mptbook` finds whatever copy is installed, or
    none; the key above would then speak of another copy than the one that ran.
    """
    sys.path.insert(0, str(ROOT))
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([others] if others else [])])


def leave_out_thebe(app, config):
    """Disconnect sphinx-thebe, which jupyter-book always loads.

    Trap: with `thebe: false` it still puts a script that names a CDN into every page.
    """
    for listeners in app.events.listeners.values():
        listeners[:] = [x for x in listeners if not x.handler.__module__.startswith("sphinx_thebe")]
    styles = app.registry.css_files
    styles[:] = [(name, options) for name, options in styles if name != "sphinx-thebe.css"]


def drop_repeated_scripts(app, pagename, templatename, context, doctree):
    """Keep the first of equal inline scripts.

    Trap: Sphinx 7.4 repeats them, and a repeated `let` is an error in the browser's console.
    """
    seen, kept = set(), []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if body is None or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept


def offer_plain_notebooks(app, error):
    """Put the exported notebooks where the download button of a chapter points.

    Trap: what MyST-NB writes there has raw directives, and outputs only after a run without cache.
    """
    downloads = Path(app.outdir) / "_sources/book"
    if error is None and downloads.is_dir():
        for path, text in exported(ROOT):
            (downloads / path.name).write_text(text, encoding="utf-8")


# The start of a docstring line under which an indented block follows, as in the dimension keys
# that stand at the head of the package's files.
KEY_HEAD = re.compile(r"^\S.*[^:\s]$")
CODE = re.compile(r"(``.+?``|(?<![`\w:])`[^`]+`(?!`))")


def as_rst(line):
    """One line of a docstring with `code` set as code, and the rest safe from reStructuredText."""
    parts = CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip('`')}``"
        else:
            parts[i] = re.sub(r"(?<!\\)(\*+(?=\w)|\||(?<=\w)_(?!\w))", r"\\\1", part)
    return "".join(parts)


def read_docstring(app, what, name, obj, options, lines):
    """Turn the package's plain docstrings into reStructuredText, before napoleon sees them.

    Trap: single backticks, stars and bars mean other things there, and under `-W` a docstring
    such as "|x| or *args" fails the build. Dimension keys become literal blocks. Napoleon takes
    what stands before a colon in the first line of a property for its type, so an empty comment
    goes first.
    """
    out, literal = ["..", ""] if what in ("property", "attribute", "data") else [], False
    for i, line in enumerate(lines):
        after = lines[i + 1] if i + 1 < len(lines) else ""
        literal = literal and (not line.strip() or line.startswith(" "))
        out.append(line if literal else as_rst(line))
        if what == "module" and not literal and KEY_HEAD.match(line) and after.startswith(" "):
            out[-1:] = [out[-1] + "::", ""]
            literal = True
    for field, info in getattr(obj, "model_fields", {}).items() if what == "class" else ():
        out += ["", f"* ``{field}``: {as_rst(info.description or '')}".rstrip(": ")]
    lines[:] = out


def short_signature(app, what, name, obj, options, signature, returns):
    """Leave out the arguments of settings classes, whose fields `read_docstring` lists.

    Trap: pydantic-settings adds some thirty arguments of its own to each of them.
    """
    if what == "class" and hasattr(obj, "model_fields"):
        return "", None
    return None


class NameAndYear(BaseLabelStyle):
    """Labels of the bibliography that agree with how the text cites: "Press et al., 2022"."""

    def format_labels(self, sorted_entries):
        given = Counter()
        for entry in sorted_entries:
            label = ", ".join(cited_as(entry))
            given[label] += 1
            yield label if given[label] == 1 else f"{label} ({given[label]})"


class AuthorYear(PlainStyle):
    """The plain style, sorted by author, with names and year for a label."""

    default_label_style = NameAndYear


def setup(app):
    """Register the above."""
    if importlib.util.find_spec("sphinx-mathjax-offline") is None:
        raise SystemExit("the book needs local MathJax: pip install sphinx-mathjax-offline")
    register_plugin("pybtex.style.formatting", "author_year", AuthorYear)
    app.add_config_value("mptbook_results", "", "env")
    app.connect("config-inited", choose_cache)
    app.connect("config-inited", run_this_tree)
    app.connect("config-inited", leave_out_thebe)
    app.connect("html-page-context", drop_repeated_scripts, priority=900)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("build-finished", offer_plain_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
