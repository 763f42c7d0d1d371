"""The built site is whole: its links lead somewhere, and no page asks another host for anything."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[1] / "_build/html"
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "shortcut icon"}

pytestmark = pytest.mark.skipif(
    not (SITE / "book/intro.html").exists(), reason="no site in _build/html; `make book` builds it"
)


class Page(HTMLParser):
    """What a page links to, loads, and can be linked by."""

    def __init__(self, path):
        super().__init__()
        self.path, self.links, self.loaded, self.anchors, self.blind = path, [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]):
            self.loaded.append(found[LOADED[tag]])
        if tag == "link" and found.get("rel") in LOADED_LINKS:
            self.loaded.append(found["href"])
        if tag == "img" and found.get("alt") is None:
            self.blind.append(found["src"])


@pytest.fixture(scope="module")
def site():
    files = [path for path in SITE.rglob("*.html") if "_static" not in path.parts]
    return {path: Page(path) for path in files}


def test_every_link_inside_the_site_leads_somewhere(site):
    broken = []
    for path, page in site.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            anchors = site[target].anchors if target in site else set()
            lost = not target.exists() or (
                url.fragment and target.suffix == ".html" and unquote(url.fragment) not in anchors
            )
            broken += [f"{path.relative_to(SITE)}: {link}"] if lost else []
    assert not broken


def test_every_image_has_a_text(site):
    assert not [(path.name, page.blind) for path, page in site.items() if page.blind]


def test_no_page_loads_anything_from_another_host(site):
    loaded = {(path.name, url) for path, page in site.items() for url in page.loaded}
    assert not [pair for pair in loaded if re.match(r"(https?:)?//", pair[1])]


def test_no_style_sheet_of_the_site_loads_anything_from_another_host():
    for path in SITE.rglob("*.css"):
        css = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]+", css), path


def test_no_inline_script_names_a_content_network(site):
    for path in site:
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", path.read_text(), re.DOTALL)
        assert not re.findall(r"unpkg\.com|cdn\.|jsdelivr|cdnjs", "".join(scripts)), path


def test_every_file_that_a_page_loads_is_there(site):
    for path, page in site.items():
        for url in page.loaded:
            local = urlsplit(url)
            if not local.netloc and local.scheme != "data":
                assert (path.parent / unquote(local.path)).exists(), f"{path.name}: {url}"


def test_mathjax_comes_with_the_site():
    assert (SITE / "_static/mathjax/tex-chtml.js").stat().st_size > 100_000
    assert list((SITE / "_static/mathjax").rglob("*.woff"))


def test_the_notebook_that_a_page_offers_is_the_plain_one():
    offered = list((SITE / "_sources/book").glob("*.ipynb"))
    assert offered
    for path in offered:
        assert "Installs the package where it is missing" in path.read_text(encoding="utf-8")
