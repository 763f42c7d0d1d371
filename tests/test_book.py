"""Each chapter shows code of the package, runs, and is built like the others."""

import ast
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import pytest
import yaml
from nbclient import NotebookClient
from pybtex.database import parse_file

ROOT = Path(__file__).parents[1]
PAGES = re.findall(r"(?:root|file): (book/\S+)", (ROOT / "_toc.yml").read_text())
SHOWN = re.compile(r"```\{literalinclude\} (\S+)\n:pyobject: (\S+)")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
MOST_LINES = 20


def text_of(page):
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


CHAPTERS = [page for page in PAGES if re.match(r"---\n.*?kernelspec", text_of(page), re.DOTALL)]
chapters = pytest.mark.parametrize("chapter", CHAPTERS)
pages = pytest.mark.parametrize("page", PAGES)


def shown(chapter):
    found = SHOWN.findall(text_of(chapter))
    return [((ROOT / "book" / file).resolve(), name) for file, name in found]


def code_cells(chapter):
    return [c for c in jupytext.reads(text_of(chapter), "md:myst").cells if c.cell_type == "code"]


def content(role):
    """The key that a role refers to: of `words <key>` the key."""
    return re.sub(r".*<(.+)>", r"\1", role, flags=re.DOTALL)


def roles(page, *names):
    return [content(text) for name, text in ROLE.findall(text_of(page)) if name in names]


@chapters
def test_what_a_chapter_shows_exists(chapter):
    for path, dotted in shown(chapter):
        body = ast.parse(path.read_text()).body
        for name in dotted.split("."):
            found = [node for node in body if getattr(node, "name", None) == name]
            assert found, f"{chapter} shows {dotted}, which {path.name} does not define"
            body = found[0].body


def test_a_room_belongs_to_one_chapter():
    owner = {}
    for chapter in CHAPTERS:
        for path, _ in shown(chapter):
            assert owner.setdefault(path, chapter) == chapter, f"{path.name} is in two chapters"


def run(chapter):
    """The cells of a chapter after its code has run, quickly and on one core."""
    notebook = jupytext.reads(text_of(chapter), "md:myst")
    resources = {"metadata": {"path": str(ROOT / "book")}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    settings = {"MPTBOOK_FAST": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    client.execute(env=os.environ | settings)
    return notebook.cells


@pytest.fixture(scope="module")
def runs(request):
    """Of each chapter that is tested, the future of `run`; two run at a time."""
    asked = [
        item.callspec.params["chapter"]
        for item in request.session.items
        if "runs" in item.fixturenames
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {chapter: pool.submit(run, chapter) for chapter in asked}
        pool.shutdown(cancel_futures=True)


@chapters
def test_a_chapter_runs_from_top_to_bottom_and_prints_no_warning(chapter, runs):
    cells = runs[chapter].result()
    outputs = [out for cell in cells for out in cell.get("outputs", [])]
    warned = [out["text"] for out in outputs if out.get("name") == "stderr"]
    assert not warned, "the site would drop this: " + "".join(warned)
    for cell in cells:
        figure = cell.metadata.get("mystnb", {}).get("figure")
        kinds = {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}
        assert not figure or "image/png" in kinds, f"{figure['name']} is not drawn"


@pages
def test_a_page_starts_with_a_label_and_a_title(page):
    text = re.sub(r"^---\n.*?\n---\n", "", text_of(page), flags=re.DOTALL)
    assert re.match(r"\s*\(ch-[\w-]+\)=\n# \S", text)


@chapters
def test_a_chapter_says_first_what_it_teaches(chapter):
    title = re.search(r"^# .+\n+", text_of(chapter), re.MULTILINE)
    assert text_of(chapter)[title.end() :].startswith(":::{admonition} In this chapter\n")


@chapters
def test_every_exercise_has_a_solution_and_two_end_in_an_assert(chapter):
    text = text_of(chapter)
    exercises = re.findall(r"\{exercise(?:-start)?\}.*\n:label: (\S+)", text)
    assert len(exercises) >= 2
    assert exercises == re.findall(r"\{solution(?:-start)?\} (\S+)", text)
    solutions = re.findall(r"\{solution-start\}(.*?)\{solution-end\}", text, re.DOTALL)
    assert len(solutions) >= 2
    for solution in solutions:
        last_cell = re.findall(r"```\{code-cell\}.*?\n(.*?)\n```", solution, re.DOTALL)[-1]
        assert isinstance(ast.parse(last_cell).body[-1], ast.Assert), last_cell


@chapters
def test_solutions_are_folded(chapter):
    for options in re.findall(r"\{solution(?:-start)?\} \S+\n(.*)", text_of(chapter)):
        assert options == ":class: dropdown"


@chapters
def test_three_questions_stand_before_the_summary(chapter):
    asked = re.search(r"\n## Check yourself\n(.*?)\n## Summary", text_of(chapter), re.DOTALL)
    assert asked, "no 'Check yourself' followed by 'Summary'"
    assert re.findall(r"^(\d)\. .*\?", asked[1], re.MULTILINE) == ["1", "2", "3"]


@chapters
def test_a_code_cell_is_short(chapter):
    for cell in code_cells(chapter):
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.source


@chapters
def test_every_figure_has_a_name_and_says_what_it_shows(chapter):
    for cell in code_cells(chapter):
        settings = cell.metadata.get("mystnb", {})
        if "plt." in cell.source or "figure" in settings:
            assert settings["figure"]["name"].startswith("fig-")
            assert settings["figure"]["caption"]
            assert settings["image"]["alt"]
    for options in re.findall(r"\{figure\}.*\n((?::\w+:.*\n)+)", text_of(chapter)):
        assert re.search(r"^:name: fig-", options, re.MULTILINE)
        assert re.search(r"^:alt: \S", options, re.MULTILINE)


@pages
def test_every_term_is_in_the_glossary(page):
    glossary = re.search(r"\{glossary\}\n(.*?)\n:::", text_of("book/glossary"), re.DOTALL)[1]
    terms = set(re.findall(r"^\S.*$", glossary, re.MULTILINE))
    assert set(roles(page, "term")) <= terms


@pages
def test_every_cited_work_is_in_the_bibliography(page):
    known = set(parse_file(str(ROOT / "book/references.bib")).entries)
    cited = {key.strip() for keys in roles(page, "cite:p", "cite:t") for key in keys.split(",")}
    assert cited <= known


def test_the_home_of_the_book_is_named_in_its_settings_only():
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    for page in PAGES:
        assert url not in text_of(page)
