"""The order in which prepared rows are seen: a pure function of (seed, step).

Resuming at a step costs nothing, and another number of processes sees the same batches.

Dimensions in this file
    N      rows of the prepared folder
    B      rows of a batch, over all processes
    T      tokens of a row
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mptbook.data.mixture import Mixture
from mptbook.data.packing import document_ids, without_first_tokens
from mptbook.data.shards import views


def about_rows(folder: str | Path) -> dict:
    """What `mptbook prepare` noted of a folder: of what it was made, and the rows of a domain.

    Raises:
        FileNotFoundError: if the folder is not a prepared one.
        ValueError: if its preparation was not finished.
    """
    note = Path(folder) / "data.json"
    if not note.exists():
        raise FileNotFoundError(f"{folder} is not prepared; run: mptbook prepare --out {folder}")
    about = json.loads(note.read_text())
    if "domains" not in about:
        raise ValueError(f"{folder} is half prepared; run the same mptbook prepare again")
    return about


class Rows:
    """The training rows of a folder that `mptbook prepare` wrote, memory-mapped.

    Args:
        row_tokens: T, a multiple of the tokens of a stored row; None takes those. Stored rows
            share their last token with the next one's first, so that neighbours join to a
            longer row.

    Attributes:
        domains: which rows are of each domain.
        packed: whether rows hold documents whole, to be kept apart.

    Raises:
        FileNotFoundError: if the folder is not a prepared one.
        ValueError: if its preparation was not finished, a file of it is damaged or missing,
            `row_tokens` is no multiple, or a domain has no row so long.
    """

    def __init__(self, folder: str | Path, row_tokens: int | None = None) -> None:
        self.folder = Path(folder)
        about = about_rows(folder)
        stored: int = about["row_tokens"]
        self.packed: bool = about["packing"] == "whole"
        self.row_tokens = row_tokens or stored
        self._joined, rest = divmod(self.row_tokens, stored)
        if rest:
            below = max(stored, self.row_tokens - rest)
            raise ValueError(
                f"row_tokens={row_tokens} is not a multiple of the {stored} tokens of a row in "
                f"{folder}; take {below}, or prepare other rows"
            )
        if self.packed and self._joined > 1:
            raise ValueError(
                f"rows of {folder} hold documents whole and cannot be joined to {row_tokens} "
                f"tokens; prepare them with --row-tokens {row_tokens}"
            )
        self.domains: dict[str, range] = {}
        self._parts, ends = [], [0]
        files = sorted((self.folder / "train").glob("*.arrow"))
        for domain, counts in sorted(about["domains"].items()):
            first = ends[-1]
            of_domain = [file for file in files if file.stem.rpartition("-")[0] == domain]
            parts = [part for file in of_domain for part in views(file, stored + 1)]
            if sum(map(len, parts)) != counts["rows"]:
                raise ValueError(
                    f"{folder} has {sum(map(len, parts)):,} of the {counts['rows']:,} rows of "
                    f"{domain}; run the same mptbook prepare again, which mends it"
                )
            for part in parts:
                self._parts.append(part)
                ends.append(ends[-1] + len(part) // self._joined)
            if ends[-1] == first:
                raise ValueError(
                    f"{domain} in {folder} has no row of {self.row_tokens} tokens; take fewer"
                )
            self.domains[domain] = range(first, ends[-1])
        self._ends = np.array(ends)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), T + 1) int64."""
        parts = np.searchsorted(self._ends, rows, side="right") - 1
        pairs = zip(parts, rows - self._ends[parts], strict=True)
        return np.stack([self._row(self._parts[part], row) for part, row in pairs])

    def _row(self, part: np.ndarray, row: int) -> np.ndarray:
        stored = part[row * self._joined : (row + 1) * self._joined]
        return np.append(stored[:, :-1], stored[-1, -1]).astype(np.int64)


@lru_cache(maxsize=32)
def _order(n_rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(n_rows)


def _shuffled(rows: range, nth: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """The nth rows of endless epochs over `rows`, each epoch in an order of its own."""
    epochs, within = np.divmod(nth, len(rows))
    found = np.empty_like(nth)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = _order(len(rows), (*seed, int(epoch)))[within[here]]
    return rows.start + found


def row_numbers(
    domains: Mapping[str, range],
    batch_rows: int,
    seed: tuple[int, ...],
    step: int,
    mixture: Mixture | None = None,
) -> np.ndarray:
    """The rows of the batch at `step`.

    Without a mixture these are epochs over all rows, each in an order of its own. With one
    they are drawn from its domains, and each domain has epochs of its own.

    Args:
        domains: which rows are of each, one range after the other, as in `Rows.domains`.

    Returns:
        (B,) int64, in [0, N). A batch may lie across two epochs.
    """
    places = np.arange(step * batch_rows, (step + 1) * batch_rows)
    if mixture is None:
        return _shuffled(range(sum(map(len, domains.values()))), places, seed)
    sources, nth = mixture.draw(places, seed)
    found = np.empty_like(places)
    for number, name in enumerate(mixture.names):
        here = sources == number
        found[here] = _shuffled(domains[name], nth[here], (*seed, number))
    return found


@dataclass(frozen=True)
class Drawn:
    """What a training takes from one domain."""

    name: str
    share: float  # of all rows
    rows: int
    tokens: int
    epochs: float  # rows drawn over rows there are
    repeats: int  # rows drawn that had been drawn before


def drawn(
    rows: Rows, n_rows: int, seed: tuple[int, ...], mixture: Mixture | None = None
) -> list[Drawn]:
    """What the first `n_rows` rows of an order take from each domain."""
    if mixture is None:
        epochs, rest = divmod(n_rows, len(rows))
        last = _shuffled(range(len(rows)), epochs * len(rows) + np.arange(rest), seed)
        inner = [domain.stop for domain in rows.domains.values()][:-1]
        counts = np.bincount(np.searchsorted(inner, last, side="right"), minlength=len(inner) + 1)
        sizes = map(len, rows.domains.values())
        taken = {
            name: epochs * size + count
            for name, size, count in zip(rows.domains, sizes, counts.tolist(), strict=True)
        }
    else:
        taken = dict(zip(mixture.names, mixture.count(n_rows, seed).tolist(), strict=True))
    return [
        Drawn(
            name=name,
            share=n / n_rows,
            rows=n,
            tokens=n * rows.row_tokens,
            epochs=n / len(rows.domains[name]),
            repeats=max(0, n - len(rows.domains[name])),
        )
        for name, n in taken.items()
    ]


def place(step: int, skipped: Sequence[int]) -> int:
    """Where the batch of a step stands in the order, if those at `skipped` are left out.

    Args:
        step: counted from 0.
        skipped: places, ascending.
    """
    for left_out in skipped:
        if left_out > step:
            break
        step += 1
    return step


def batches(
    rows: Rows,
    batch_rows: int,
    *,
    seed: int | tuple[int, ...],
    mixture: Mixture | None = None,
    start: int = 0,
    skipped: Sequence[int] = (),
    end_of_text: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """(inputs, targets) of step `start`, `start` + 1, ... without an end.

    Args:
        batch_rows: B; each process gets B / `world` of them.
        seed: of the order; more than one number where a training has several orders.
        mixture: of domains that `rows` has; None takes all rows alike.
        skipped: places in the order whose batches are left out, ascending; later batches move
            up.
        end_of_text: give it to keep documents of a row apart: the first token of each then
            costs nothing, and a third tensor has the `document_ids` of the inputs.

    Returns:
        int64 tensors, (B / world, T) each.

    Raises:
        ValueError: if `world` does not divide B.
    """
    if batch_rows % world:
        raise ValueError(
            f"{batch_rows} rows do not split over {world} processes; "
            f"take a multiple of {world} rows"
        )
    key = seed if isinstance(seed, tuple) else (seed,)
    step = start
    while True:
        at = place(step, skipped)
        mine = row_numbers(rows.domains, batch_rows, key, at, mixture)[rank::world]
        block = torch.from_numpy(rows[mine])
        inputs, targets = block[:, :-1], block[:, 1:]
        if end_of_text is None:
            yield inputs, targets
        else:
            apart = without_first_tokens(inputs, targets, end_of_text)
            yield inputs, apart, document_ids(inputs, end_of_text)
        step += 1
