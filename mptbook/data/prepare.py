"""Texts to rows of tokens on disk: `mptbook prepare`.

The folder holds `tokenizer.json`, Arrow files of rows under `train/`, the untouched held-out
documents under `heldout/`, and `data.json`, which says what was made of what.
"""

import difflib
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow
from pydantic import Field, PositiveInt
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mptbook import wheels
from mptbook.data.cleaning import Cleaner
from mptbook.data.corpora import default_domains, held_out, read_domain
from mptbook.data.packing import concatenate_and_cut, pack_whole
from mptbook.data.shards import digest, read_table, views, write_rows, write_table
from mptbook.data.sources import HUB, Document, source_files
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

DEFAULT = "default"  # as a source: the default domain of that name
SECONDS_BETWEEN_LINES = 5  # where the output is not a terminal


@dataclass(frozen=True)
class Counts:
    """What became of one domain."""

    documents: int
    rows: int
    filling: int  # tokens that only fill rows up
    train_bytes: int
    heldout_bytes: int
    dropped: dict[str, int]  # documents that are not among them, by reason


class Prepare(RunSettings):
    """Turn texts into packed rows of tokens: `mptbook prepare`."""

    out: Path = Field(description="folder to write")
    tokenizer: str = Field("gpt-neox", description="gpt-neox, a tokenizer.json, or a hub name")
    row_tokens: PositiveInt = Field(2048, description="tokens of a row (the context length)")
    packing: Literal["cut", "whole"] = Field(
        "cut", description="cut: documents end to end; whole: none is split that fits a row"
    )
    source: dict[str, str] = Field(
        {},
        description="domain=SOURCE, or domain=default for one of the default domains (see mptbook "
        "corpora); without any, all of those",
    )
    filtered: list[str] = Field(
        [], description="domains whose documents must look like prose, as MPT-7B's mC4 had to"
    )
    near_copies: float | None = Field(
        None, gt=0, le=1, description="overlap with an earlier document that drops one, e.g. 0.8"
    )
    hold_out: list[str] = Field(
        [], description="""names of documents of which nothing is for training; '"A, B"' is one"""
    )
    stream: bool = Field(
        True, description="read datasets of the hub as they come; false: fetch them first"
    )
    max_documents: PositiveInt | None = Field(
        None, description="read at most so many documents of a source, e.g. of a stream"
    )
    shard_documents: PositiveInt = Field(
        2000, description="documents of a shard, the unit that a restart keeps"
    )

    def run(self) -> None:
        for name, counts in prepare(self).items():
            share = counts.filling / (counts.rows * (self.row_tokens + 1))
            print(
                f"{name}: {counts.documents:,} documents, {counts.rows:,} rows of "
                f"{self.row_tokens} tokens ({share:.1%} filling), "
                f"{counts.heldout_bytes:,} bytes held out"
            )
            for reason, n in counts.dropped.items():
                print(f"  dropped: {n:,} documents, {reason}")


def prepare(settings: Prepare) -> dict[str, Counts]:
    """Write the folder; shards that an interrupted run has finished are kept.

    Raises:
        ValueError: if the folder holds rows of another tokenizer, length or source, or if a
            domain has no text for training or none held out.
    """
    tokenizer = Tokenizer.load(settings.tokenizer)
    sources = {
        name: None if source == DEFAULT else source
        for name, source in (settings.source or dict.fromkeys(default_domains(), DEFAULT)).items()
    }
    for name in sources:
        if not re.fullmatch(r"\w[^/\\\0]*", name):  # files are called after it
            raise ValueError(
                f"source has the domain {name!r}; begin it with a letter, without / or \\"
            )
    for name in set(settings.filtered) - set(sources):
        raise ValueError(f"filtered has {name!r}; the domains are {', '.join(sources)}")
    made_of = {
        "tokenizer": tokenizer.sha256,
        "row_tokens": settings.row_tokens,
        "packing": settings.packing,
        "filtered": settings.filtered,
        "near_copies": settings.near_copies,
        "hold_out": settings.hold_out,
        "max_documents": settings.max_documents,
        "shard_documents": settings.shard_documents,
        "sources": sources,
        "texts": {name: _state_of(source) for name, source in sources.items()},
    }
    digests = _claim(settings.out, made_of)
    tokenizer.save(settings.out / "tokenizer.json")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    done = {}
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty()) as progress:
        for name, source in sources.items():
            done[name] = _domain(settings, tokenizer, name, source, digests, progress)
    _see_held_out(settings)
    made_of["domains"] = {name: asdict(counts) for name, counts in done.items()}
    shards = sorted((settings.out / "train").glob("*.arrow"))
    made_of["shards"] = {shard.name: digest(shard) for shard in shards}
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
        files = [(str(file), file.stat()) for file in source_files(source.partition("#")[0])]
        seen = str([(name, status.st_size, status.st_mtime_ns) for name, status in files])
    return hashlib.sha256(seen.encode()).hexdigest()[:12]


def _domain(
    settings: Prepare,
    tokenizer: Tokenizer,
    name: str,
    source: str | None,
    digests: dict[str, str],
    progress: Progress,
) -> Counts:
    cleaner = Cleaner(name in settings.filtered, settings.near_copies)
    documents = cleaner.kept(
        islice(read_domain(name, source, settings.stream), settings.max_documents)
    )
    task = progress.add_task(name, total=settings.max_documents)
    heldout: list[Document] = []
    n_documents = n_rows = n_bytes = filling = 0
    start = last_line = time.monotonic()
    for number, shard in enumerate(_chunks(documents, settings.shard_documents)):
        texts, tails = _split(shard, settings.hold_out)
        heldout += tails
        n_documents += len(shard)
        n_bytes += sum(len(text.encode()) for text in texts)
        path = settings.out / "train" / f"{name}-{number:05d}.arrow"
        if not _is_sound(path, settings.row_tokens, digests):
            write_rows(path, _lay(texts, tokenizer, settings), len(tokenizer))
        for rows in views(path, settings.row_tokens + 1):
            n_rows += len(rows)
            ended = rows == tokenizer.end_of_text
            filling += int((ended[:, 1:] & ended[:, :-1]).sum())
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
    columns = {"name": [d.name for d in heldout], "text": [d.text for d in heldout]}
    write_table(settings.out / "heldout" / f"{name}.arrow", pyarrow.table(columns))
    heldout_bytes = sum(len(document.text.encode()) for document in heldout)
    dropped = dict(cleaner.dropped)
    return Counts(n_documents, n_rows, filling, n_bytes, heldout_bytes, dropped)


def _is_sound(shard: Path, row_tokens: int, digests: dict[str, str]) -> bool:
    """Whether a shard is there, can be read, and is as it was when the folder was finished."""
    if not shard.exists():
        return False
    try:
        views(shard, row_tokens + 1)
    except ValueError:
        sound = False
    else:
        sound = shard.name not in digests or digest(shard) == digests[shard.name]
    if not sound:
        print(f"{shard} is damaged, and written again", flush=True)
    return sound


def _split(shard: list[Document], whole: list[str]) -> tuple[list[str], list[Document]]:
    """The texts for training, and the documents held out; of those in `whole` everything."""
    texts, heldout = [], []
    for document in shard:
        text, tail = ("", document.text) if document.name in whole else held_out(document)
        if text.strip():
            texts.append(text)
        if tail.strip():
            heldout.append(Document(document.name, tail))
    return texts, heldout


def _see_held_out(settings: Prepare) -> None:
    """A misspelt name would silently leave its document in the training rows."""
    names = set()
    for file in (settings.out / "heldout").glob("*.arrow"):
        names.update(read_table(file)["name"])
    for name in settings.hold_out:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"hold_out has {name!r}, but no document has this name{hint}; remove "
                f"{settings.out} and prepare again"
            )


def _chunks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    while chunk := list(islice(documents, size)):
        yield chunk


def _lay(texts: list[str], tokenizer: Tokenizer, settings: Prepare) -> np.ndarray:
    """Rows of the texts, (N, T + 1)."""
    ids = tokenizer.encode_batch(texts)  # on all cores
    lay = pack_whole if settings.packing == "whole" else concatenate_and_cut
    return lay(ids, settings.row_tokens, tokenizer.end_of_text)[0]


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def _claim(out: Path, made_of: dict) -> dict[str, str]:
    """Mark the folder as made of `made_of`, or refuse it if it is made of something else.

    Returns:
        The digests of its shards, if it was prepared before.
    """
    note = out / "data.json"
    if note.exists():
        found = json.loads(note.read_text())
        if {path.name for path in out.iterdir()} <= {"data.json", "tokenizer.json"}:  # a first try
            _write_json(note, made_of)
            return {}
        for key, value in made_of.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{out} was prepared with {key} {found.get(key)!r}, not {value!r}; "
                    "remove the folder or choose another --out"
                )
        return found.get("shards", {})
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and was not made by mptbook prepare")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(note, made_of)
    return {}
