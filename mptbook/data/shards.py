"""The Arrow files of a prepared folder: written whole, read without a copy.

Dimensions in this file
    N   rows of a file
    T   tokens of a row that the model reads; a stored row has T + 1
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow

if TYPE_CHECKING:
    import datasets


def write_rows(file: Path, rows: np.ndarray, vocab_size: int) -> None:
    """Write rows of tokens, (N, T + 1), in 16 bits each where the vocabulary allows it."""
    import datasets

    dtype = "uint16" if vocab_size <= 2**16 else "int32"
    features = datasets.Features({"ids": datasets.List(datasets.Value(dtype), rows.shape[1])})
    values = pyarrow.array(rows.astype(dtype).ravel())
    ids = pyarrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
    write_table(file, pyarrow.table({"ids": ids}, schema=features.arrow_schema))


def write_table(file: Path, table: pyarrow.Table) -> None:
    """Write a table that `datasets.Dataset.from_file` reads.

    It gets its name last, so that a file of that name is always whole. It is of one piece,
    because neighbouring rows can be joined only within a piece.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with pyarrow.ipc.new_stream(str(partial), table.schema) as writer:
        writer.write_table(table)
    partial.replace(file)


def read_table(file: Path) -> "datasets.Dataset":
    """What `write_table` wrote, memory-mapped.

    Raises:
        ValueError: if the file is damaged.
    """
    import datasets  # takes most of a second, for which a model alone need not wait

    try:
        return datasets.Dataset.from_file(str(file))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file} is damaged ({reason}); run the same mptbook prepare again, which mends it"
        ) from None


def views(file: Path, width: int) -> list[np.ndarray]:
    """The rows of a file, in pieces of (n, width), without a copy.

    Raises:
        ValueError: if the file is damaged.
    """
    column = read_table(file).data.column("ids")
    return [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks if len(chunk)]


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
