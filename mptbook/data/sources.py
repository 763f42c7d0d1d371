"""Documents out of local files and of datasets of the hub."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow

HUB = "hf:"  # how a source says that it is a dataset of the hub
KINDS = ".txt", ".jsonl", ".parquet", ".arrow"
COLUMNS = "text", "content"  # where a row may have its text; the first that it has is read

SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


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


def read_source(source: str, stream: bool = True) -> Iterator[Document]:
    """The documents of local files or of a hub dataset.

    Args:
        source: a file; a folder; `hf:OWNER/NAME`, if need be with `/FOLDER` and `:CONFIG`; or a
            pattern of files on the hub, `hf://datasets/OWNER/NAME/FILES*.parquet` (or .json.gz
            and the like). With `#FIELD=VALUE` at its end only rows that have this value are
            read; dots lead into a field of fields.
        stream: read the hub's rows as they come, or fetch them first.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a file cannot be read, or a row has no text; it is named.
        ConnectionError: if the hub does not give the dataset.
    """
    place, _, wanted = source.partition("#")
    if place.startswith(HUB):
        yield from _rows(place.removeprefix(HUB).lstrip("/"), open_hub(place, stream), wanted)
        return
    for file in source_files(place):
        name = str(file.relative_to(place)) if file != Path(place) else file.name
        if file.suffix == ".txt":
            yield Document(name, decode(str(file), file.read_bytes()))
        else:
            rows = _json_lines(file) if file.suffix == ".jsonl" else open_table(file)
            yield from _rows(name, rows, wanted)


def open_hub(place: str, stream: bool) -> Iterable[dict]:
    """The rows of a dataset of the hub; see `read_source`."""
    how = {"split": "train", "streaming": stream}
    try:
        if place.startswith("hf://"):
            kind = "parquet" if place.endswith(".parquet") else "json"
            return datasets.load_dataset(kind, data_files=place, **how)
        path, _, config = place.removeprefix(HUB).partition(":")
        parts = path.split("/")
        if parts[2:]:
            how["data_dir"] = "/".join(parts[2:])
        return datasets.load_dataset("/".join(parts[:2]), config or None, **how)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(f"the hub did not give {place}: {reason}") from error


def source_files(source: str) -> list[Path]:
    """The files that a local source means, sorted.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there is no file of a known kind.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source} does not exist; give a path, or hf:NAME for the hub")
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.suffix in KINDS]
    if not files:
        raise ValueError(f"{source} is no {', '.join(KINDS)} file, nor a folder with one")
    return files


def open_table(file: Path) -> datasets.Dataset:
    """The rows of a parquet or Arrow file."""
    read = (
        datasets.Dataset.from_parquet if file.suffix == ".parquet" else datasets.Dataset.from_file
    )
    try:
        return read(str(file))
    except (pyarrow.ArrowInvalid, datasets.exceptions.DatasetGenerationError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{file} cannot be read ({reason}); fetch or write it again") from None


def _json_lines(file: Path) -> Iterator[dict]:
    for number, line in enumerate(decode(str(file), file.read_bytes()).split("\n"), start=1):
        try:
            if not line.strip():
                continue
            row = json.loads(line)
            if SURROGATE.search(line):  # half of a pair is no character, and no tokenizer takes it
                json.dumps(row, ensure_ascii=False).encode()
        except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}, is not JSON ({error}); mend it") from None
        if not isinstance(row, dict):
            raise ValueError(
                f'{file}, line {number}, is no object such as {{"text": ...}}; mend it'
            )
        yield row


def _rows(name: str, rows: Iterable[dict], wanted: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if wanted and not has_value(row, wanted, name):
            continue
        text = next((row[column] for column in COLUMNS if isinstance(row.get(column), str)), None)
        if text is None:
            raise ValueError(f"row {number} of {name} has no column `text`; it has {sorted(row)}")
        yield Document(f"{name}:{number}", text)


def has_value(row: dict, wanted: str, name: str) -> bool:
    """Whether a row has the value that `FIELD.FIELD=VALUE` asks for."""
    path, _, value = wanted.partition("=")
    found = row
    for field in path.split("."):
        if not isinstance(found, dict) or field not in found:
            raise ValueError(f"rows of {name} have no field {path}; they have {sorted(row)}")
        found = found[field]
    return str(found) == value
