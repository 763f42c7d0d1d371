"""`mptbook bench packing`: documents in rows of their own, packed whole, and cut.

Dimensions in this file
    B   rows of a batch
    N   rows of all documents
    T   tokens of a row
"""

import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mptbook.bench.measure import Bench, in_turns, noise
from mptbook.data.corpora import load_domain
from mptbook.data.packing import (
    concatenate_and_cut,
    document_ids,
    pack_whole,
    without_first_tokens,
)
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.loop import train_steps
from mptbook.train.optimizer import Optim, make_optimizer

ALONE, WHOLE, CUT = "a document a row", "packed whole", "cut"


def layouts(
    documents: Sequence[list[int]], row_tokens: int, end_of_text: int
) -> dict[str, np.ndarray]:
    """(N, T + 1) int32 for each way to lay documents into rows.

    `ALONE` gives each document rows of its own, filled up with `end_of_text`.
    """
    alone = [pack_whole([ids], row_tokens, end_of_text)[0] for ids in documents]
    return {
        ALONE: np.concatenate(alone),
        WHOLE: pack_whole(documents, row_tokens, end_of_text)[0],
        CUT: concatenate_and_cut(documents, row_tokens, end_of_text)[0],
    }


def filling(rows: np.ndarray, end_of_text: int) -> float:
    """Share of tokens that only fill rows up: every `end_of_text` behind another."""
    ended = rows == end_of_text
    return float((ended[:, 1:] & ended[:, :-1]).sum() / rows.size)


def batches(
    rows: np.ndarray, batch_rows: int, end_of_text: int, apart: bool
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of rows by chance, the same series each time, (B, T) int64.

    Args:
        apart: keep documents apart, as `mptbook.data.loader.batches` does.
    """
    chance = np.random.default_rng(0)
    while True:
        block = torch.from_numpy(rows[chance.integers(len(rows), size=batch_rows)]).long()
        x, y = block[:, :-1], block[:, 1:]
        if apart:
            yield x, without_first_tokens(x, y, end_of_text), document_ids(x, end_of_text)
        else:
            yield x, y


class BenchPacking(Bench):
    """Rows for documents of all lengths: `mptbook bench packing`."""

    domain: str = Field("wiki", description="whose documents; see mptbook corpora")
    tokenizer: str = Field("gpt-neox", description="gpt-neox, a tokenizer.json, or a hub name")
    row_tokens: PositiveInt = Field(1024, description="tokens of a row")
    batch_rows: PositiveInt = Field(4, description="rows of a step")
    steps: PositiveInt = Field(4, description="training steps that are timed at once")
    repeats: PositiveInt = Field(5, description="rounds; the median is taken")

    def compare(self) -> dict:
        """The figures, as JSON has them: for each way rows, filling, and targets a second."""
        tokenizer = Tokenizer.load(self.tokenizer)
        documents = tokenizer.encode_batch(load_domain(self.domain, "train")["text"][:])
        keep_freed_memory()
        laid = layouts(documents, self.row_tokens, tokenizer.end_of_text)
        trained: dict[str, int] = {}
        runs = {name: self._training(name, rows, tokenizer, trained) for name, rows in laid.items()}
        seconds = in_turns(runs, self.repeats)
        found = {}
        for name, rows in laid.items():
            # All rounds together: a round's batches differ in what fills them.
            targets = trained[name] / (self.repeats + 1)
            found[name] = {
                "rows": len(rows),
                "filling": filling(rows, tokenizer.end_of_text),
                "targets_per_second": targets / statistics.median(seconds[name]),
                "noise": noise(seconds[name]),
            }
            print(
                f"{name:18} {len(rows):8,} rows  {found[name]['filling']:6.1%} filling  "
                f"{found[name]['targets_per_second']:8,.0f} targets/s"
            )
        return {
            "settings": self.model_dump(mode="json", exclude={"out"}),
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "ways": found,
        }

    def _training(
        self, name: str, rows: np.ndarray, tokenizer: Tokenizer, trained: dict[str, int]
    ) -> Callable[[], None]:
        """A function that takes `steps` more steps and counts their targets in `trained`."""
        vocabulary = -(-len(tokenizer) // 128) * 128
        torch.manual_seed(0)
        model = MPT(
            MPTConfig.named("mpt-tiny").replace(
                max_seq_len=self.row_tokens,
                vocab_size=vocabulary,
                attn_uses_sequence_id=name != CUT,
            )
        )
        optim = Optim()
        stream = batches(rows, self.batch_rows, tokenizer.end_of_text, name != CUT)
        last = self.steps * (self.repeats + 1)
        logs = train_steps(
            model, stream, make_optimizer(model, optim), optim.rates(10 * last + 1000), steps=last
        )
        trained[name] = 0

        def some_steps() -> None:
            for _ in range(self.steps):
                trained[name] += next(logs).targets

        return some_steps
