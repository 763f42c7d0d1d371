"""The order in which prepared rows are seen: a pure function of (seed, step).

Resuming at a step costs nothing, and another number of processes sees the same batches.

Dimensions in this file
    N      rows of the prepared folder
    B      rows of a batch, over all processes
    T      tokens of a row
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mptbook.data.packing import document_ids


class Rows:
    """The training rows of a folder that `mptbook prepare` wrote, memory-mapped.

    Raises:
        FileNotFoundError: if the folder is not a prepared one.
        ValueError: if its preparation was not finished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        note = self.folder / "data.json"
        if not note.exists():
            raise FileNotFoundError(
                f"{folder} is not prepared; run: mptbook prepare --out {folder}"
            )
        self.about = json.loads(note.read_text())
        if "domains" not in self.about:
            raise ValueError(f"{folder} is half prepared; run the same mptbook prepare again")
        self.row_tokens: int = self.about["row_tokens"]
        files = sorted((self.folder / "train").glob("*.arrow"))
        self._parts = [part for file in files for part in _views(file, self.row_tokens + 1)]
        self._ends = np.cumsum([len(part) for part in self._parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), T + 1) int64."""
        parts = np.searchsorted(self._ends, rows, side="right")
        starts = np.concatenate([[0], self._ends])[parts]
        pairs = zip(parts, rows - starts, strict=True)
        return np.stack([self._parts[part][row] for part, row in pairs]).astype(np.int64)


def _views(file: Path, width: int) -> list[np.ndarray]:
    """The rows of one Arrow file, without a copy."""
    import datasets  # takes most of a second, for which a model alone need not wait

    column = datasets.Dataset.from_file(str(file)).data.column("ids")
    return [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks if len(chunk)]


@lru_cache(maxsize=2)
def _order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


def row_numbers(n_rows: int, batch_rows: int, seed: int, step: int) -> np.ndarray:
    """The rows of the batch at `step`: epochs of all rows, each in an order of its own.

    Returns:
        (B,) int64, in [0, N). A batch may lie across two epochs.
    """
    places = np.arange(step * batch_rows, (step + 1) * batch_rows)
    return np.array([_order(n_rows, seed, place // n_rows)[place % n_rows] for place in places])


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
    seed: int,
    start: int = 0,
    skipped: Sequence[int] = (),
    end_of_text: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """(inputs, targets) of step `start`, `start` + 1, ... without an end.

    Args:
        batch_rows: B; each process gets B / `world` of them.
        skipped: places in the order whose batches are left out, ascending; later batches move
            up.
        end_of_text: give it to get a third tensor, the `document_ids` of the inputs.

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
    step = start
    while True:
        at = place(step, skipped)
        mine = row_numbers(len(rows), batch_rows, seed, at)[rank::world]
        block = torch.from_numpy(rows[mine])
        inputs, targets = block[:, :-1], block[:, 1:]
        if end_of_text is None:
            yield inputs, targets
        else:
            yield inputs, targets, document_ids(inputs, end_of_text)
        step += 1
