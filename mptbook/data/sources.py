"""Documents out of local files and of datasets of the hub."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

HUB = "hf:"  # how a source says that it is a dataset of the hub


@dataclass(frozen=True)
class Document:
    name: str  # unique in its domain, and the same on every machine
    text: str


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


def read_source(source: str) -> Iterator[Document]:
    """The documents of a hub dataset or of local files; see `read_domain`."""
    if source.startswith(HUB):
        repository, _, config = source.removeprefix(HUB).partition(":")
        rows = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        yield from _rows(repository, rows)
        return
    for file in source_files(source):
        name = str(file.relative_to(source)) if file != Path(source) else file.name
        if file.suffix == ".txt":
            yield Document(name, decode(str(file), file.read_bytes()))
        elif file.suffix == ".jsonl":
            yield from _rows(name, _json_lines(file))
        else:
            yield from _rows(name, datasets.Dataset.from_parquet(str(file)))


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
