"""How well a model predicts a text: perplexity, and bits per byte.

Dimensions in this file
    T   tokens of a row
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mptbook import world
from mptbook.data.packing import concatenate_and_cut
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """What a text cost a model."""

    nats: float
    targets: int  # tokens predicted, end-of-text tokens included
    bytes: int  # of the text as UTF-8

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, self.bytes)

    def __add__(self, other: "Prediction") -> "Prediction":
        return Prediction(
            self.nats + other.nats, self.targets + other.targets, self.bytes + other.bytes
        )


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats of a whole text as bits for each of its bytes.

    Unlike a loss per token it does not depend on the tokenizer (Gao et al.,
    arXiv:2101.00027, section 3.1).
    """
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def perplexity(
    model: MPT,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    row_tokens: int | None = None,
    batch_rows: int = 16,
    precision: Precision = "auto",
) -> Prediction:
    """What `texts` cost `model`, read in rows as it was trained.

    Every token of every text is predicted exactly once, and an end-of-text after each. A
    token sees what stands before it in its row, up to T - 1 tokens. Where several processes
    work together, all call this with the same texts, share the rows, and get the same answer.

    Args:
        row_tokens: T; the model's `max_seq_len` if not given.
        batch_rows: rows at a time.
        precision: of products; see `mptbook.model.precision.autocast`.

    Raises:
        ValueError: if there is no text.
    """
    if not any(texts):
        raise ValueError("there is no text to predict")
    row_tokens = row_tokens or model.config.max_seq_len
    # An end-of-text in front, so that the first token is predicted too.
    documents = [[], *tokenizer.encode_batch(texts)]
    rows, rest = concatenate_and_cut(documents, row_tokens, tokenizer.end_of_text)
    blocks = [block for block in torch.from_numpy(rows).long().split(batch_rows) if len(block)]
    if len(rest) > 1:
        blocks.append(torch.from_numpy(rest).long()[None])
    model.eval()
    nats = 0.0
    own = blocks[world.rank() :: world.size()]
    for turn in range(-(-len(blocks) // world.size())):
        # Who has no more takes part for the others' sake: parts of the weights are with it.
        block = own[turn] if turn < len(own) else blocks[0]
        x, y = block[:, :-1].to(model.device), block[:, 1:].to(model.device)
        with autocast(model.device, precision):
            loss = float(model.loss(x, y))
        nats += loss if turn < len(own) else 0.0
    targets = sum(block[:, 1:].numel() for block in blocks)
    (nats,) = world.total([nats], model.device)
    return Prediction(nats, targets, sum(len(text.encode()) for text in texts))
