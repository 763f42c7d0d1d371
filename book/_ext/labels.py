"""The labels, titles and cited works of the book, with the numbers that the site gives them.

Convention that the numbers rest on: figures are named fig-..., tables tab-..., equations eq-...,
exercises ex-..., and every one of them has a name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from pybtex.database import parse_file

LABEL = re.compile(
    r"^\((?P<section>[\w-]+)\)=\n+#+ (?P<title>.+)$"
    r"|^(?::| +|.*\{)name: (?P<named>(?:fig|tab)-[\w-]+)"
    r"|^:label: (?P<labelled>(?:ex|eq)-[\w-]+)$"
    r"|^\$\$ \((?P<equation>[\w:-]+)\)$",
    re.MULTILINE,
)
NUMBERED = {"fig": "Fig. {}", "tab": "Table {}", "eq": "({})", "ex": "Exercise {}"}


@dataclass
class Target:
    """What a reference says, and where it leads."""

    text: str
    url: str
    number: str = ""


def cited_as(entry):
    """The authors and the year of a work in the bibliography, as a sentence names them."""
    names = [" ".join(person.last_names) for person in entry.persons["author"]]
    if len(names) > 2:
        names = [f"{names[0]} et al."]
    return re.sub(r"[{}]", "", " and ".join(names)), entry.fields["year"]


def labels_of(text, url, chapter):
    """The targets of one page, numbered as the site numbers them."""
    counts, found = dict.fromkeys(NUMBERED, 0), {}
    for match in LABEL.finditer(text):
        if match["section"]:
            anchor = match["section"].lower().replace("_", "-")
            found[match["section"]] = Target(match["title"].strip(), f"{url}#{anchor}")
            continue
        name = match["named"] or match["labelled"] or match["equation"]
        kind = name.split("-")[0]
        counts[kind] += 1
        number = f"{chapter}.{counts[kind]}"
        anchor = f"equation-{name}" if kind == "eq" else name
        found[name] = Target(NUMBERED[kind].format(number), f"{url}#{anchor}", number)
    return found


@dataclass
class Book:
    """What text must know about the rest of the book."""

    root: Path  # folder of the repository
    url: str  # of the repository
    site: str  # of the published pages
    pages: list[str]  # names in reading order
    titles: dict[str, str]  # page -> title
    targets: dict[str, Target]  # label -> Target
    works: dict[str, tuple[str, str]]  # citation key -> (authors, year)

    @classmethod
    def read(cls, root):
        """The book whose `_config.yml` and `_toc.yml` lie in `root`."""
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
        toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
        site = config["html"]["baseurl"].rstrip("/")
        pages, titles, targets, number = [toc["root"]], {}, {}, 0
        numbers = {}
        for part in toc["parts"]:
            for chapter in part["chapters"]:
                pages.append(chapter["file"])
                number += 1 if part.get("numbered") else 0
                numbers[chapter["file"]] = number
        for page in pages:
            text = (root / f"{page}.md").read_text(encoding="utf-8")
            titles[page.removeprefix("book/")] = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
            targets |= labels_of(text, f"{site}/{page}.html", numbers.get(page))
        bibliography = parse_file(str(root / "book/references.bib")).entries
        works = {key: cited_as(entry) for key, entry in bibliography.items()}
        names = [page.removeprefix("book/") for page in pages]
        return cls(root, config["repository"]["url"], site, names, titles, targets, works)

    def target(self, label):
        """Where a label leads.

        Raises:
            ValueError: if no page has it.
        """
        if label not in self.targets:
            raise ValueError(f"no page of the book has the label {label}")
        return self.targets[label]
