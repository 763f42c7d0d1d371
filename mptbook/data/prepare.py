"""Texts to rows of tokens on disk: `mptbook prepare`.

The folder holds `tokenizer.json`, Arrow files of rows under `train/`, the untouched held-out
documents under `heldout/`, and `data.json`, which says what was made of what.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from pydantic import Field, PositiveInt
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mptbook import wheels
from mptbook.data.corpora import default_domains, held_out, read_domain
from mptbook.data.packing import concatenate_and_cut
from mptbook.data.sources import HUB, Document, source_files
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

SECONDS_BETWEEN_LINES = 5  # where the output is not a terminal


@dataclass(frozen=True)
class Counts:
    """What became of one domain."""

    documents: int
    rows: int
    train_bytes: int
    heldout_bytes: int


class Prepare(RunSettings):
    """Turn texts into packed rows of tokens: `mptbook prepare`."""

    out: Path = Field(description="folder to write")
    tokenizer: str = Field("gpt-neox", description="gpt-neox, a tokenizer.json, or a hub name")
    row_tokens: PositiveInt = Field(2048, description="tokens of a row (the context length)")
    source: dict[str, str] = Field(
        {}, description="domain=SOURCE; without any, the default domains (see mptbook corpora)"
    )
    max_documents: PositiveInt | None = Field(
        None, description="read at most so many documents of a source, e.g. of a stream"
    )
    shard_documents: PositiveInt = Field(
        2000, description="documents of a shard, the unit that a restart keeps"
    )

    def run(self) -> None:
        for name, counts in prepare(self).items():
            print(
                f"{name}: {counts.documents:,} documents, {counts.rows:,} rows of "
                f"{self.row_tokens} tokens, {counts.heldout_bytes:,} bytes held out"
            )


def prepare(settings: Prepare) -> dict[str, Counts]:
    """Write the folder; shards that an interrupted run has finished are kept.

    Raises:
        ValueError: if the folder holds rows of another tokenizer, length or source, or if a
            domain has no text for training or none held out.
    """
    tokenizer = Tokenizer.load(settings.tokenizer)
    sources = settings.source or dict.fromkeys(default_domains())
    made_of = {
        "tokenizer": tokenizer.sha256,
        "row_tokens": settings.row_tokens,
        "max_documents": settings.max_documents,
        "shard_documents": settings.shard_documents,
        "sources": sources,
        "texts": {name: _state_of(source) for name, source in sources.items()},
    }
    _claim(settings.out, made_of)
    tokenizer.save(settings.out / "tokenizer.json")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    done = {}
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as progress:
        for name, source in sources.items():
            done[name] = _domain(settings, tokenizer, name, source, progress)
    made_of["domains"] = {name: asdict(counts) for name, counts in done.items()}
    _write_json(settings.out / "data.json", made_of)
    return done


def _state_of(source: str | None) -> str:
    """Changes when the texts of a source do, as far as can be seen without reading them.

    A shard that is kept must be of the texts that are prepared now. A path that is not there
    is found here, before anything is written.
    """
    if source is None:
        seen = f"{sorted(wheels.pins().items())} {sys.version}"  # the code is Python's own
    elif source.startswith(HUB):
        return source
    else:
        files = [(str(file), file.stat()) for file in source_files(source)]
        seen = str([(name, status.st_size, status.st_mtime_ns) for name, status in files])
    return hashlib.sha256(seen.encode()).hexdigest()[:12]


def _domain(
    settings: Prepare, tokenizer: Tokenizer, name: str, source: str | None, progress: Progress
) -> Counts:
    documents = islice(read_domain(name, source), settings.max_documents)
    total = settings.max_documents
    if not (source or "").startswith(HUB):  # a stream of the hub is too long to be counted
        listed = list(documents)
        documents, total = iter(listed), len(listed)
    task = progress.add_task(name, total=total)
    heldout: list[Document] = []
    n_documents = n_rows = n_bytes = 0
    start = last_line = time.monotonic()
    for number, shard in enumerate(_chunks(documents, settings.shard_documents)):
        parts = [held_out(document) for document in shard]
        texts = [text for text, _ in parts if text.strip()]
        heldout += [
            Document(document.name, tail)
            for document, (_, tail) in zip(shard, parts, strict=True)
            if tail.strip()
        ]
        n_documents += len(shard)
        n_bytes += sum(len(text.encode()) for text in texts)
        path = settings.out / "train" / f"{name}-{number:05d}.arrow"
        if not path.exists():
            _write_rows(path, texts, tokenizer, settings.row_tokens)
        n_rows += len(datasets.Dataset.from_file(str(path)))
        progress.advance(task, len(shard))
        now = time.monotonic()
        if progress.disable and now - last_line > SECONDS_BETWEEN_LINES:
            speed = n_bytes / 1e6 / (now - start)
            print(f"{name}: {n_documents:,} documents, {speed:.1f} MB/s", flush=True)
            last_line = now
    if not n_rows or not heldout:
        raise ValueError(
            f"{name}: {n_documents} documents gave {n_rows} rows of {settings.row_tokens} tokens "
            f"and {len(heldout)} held-out texts; it needs more text"
        )
    _write_arrow(
        settings.out / "heldout" / f"{name}.arrow",
        datasets.Features({"name": datasets.Value("string"), "text": datasets.Value("string")}),
        {"name": [d.name for d in heldout], "text": [d.text for d in heldout]},
    )
    heldout_bytes = sum(len(document.text.encode()) for document in heldout)
    return Counts(n_documents, n_rows, n_bytes, heldout_bytes)


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, size)):
        yield chunk


def _write_rows(path: Path, texts: list[str], tokenizer: Tokenizer, row_tokens: int) -> None:
    ids = tokenizer.encode_batch(texts)  # on all cores
    rows, _ = concatenate_and_cut(ids, row_tokens, tokenizer.end_of_text)
    dtype = "uint16" if len(tokenizer) <= 2**16 else "int32"
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype), row_tokens + 1)})
    _write_arrow(path, features, {"ids": list(rows.astype(dtype))})


def _write_arrow(path: Path, features: datasets.Features, columns: dict) -> None:
    """Write under another name first: a file of the final name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with ArrowWriter(features=features, path=str(partial)) as writer:
        if any(map(len, columns.values())):
            writer.write_batch(columns)
        writer.finalize()
    partial.replace(path)


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _claim(out: Path, made_of: dict) -> None:
    """Mark the folder as made of `made_of`, or refuse it if it is made of something else."""
    note = out / "data.json"
    if note.exists():
        found = json.loads(note.read_text())
        for key, value in made_of.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{out} was prepared with {key} {found.get(key)!r}, not {value!r}; "
                    "remove the folder or choose another --out"
                )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by mptbook prepare")
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(note, made_of)
