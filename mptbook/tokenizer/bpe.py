"""Learn a byte-level BPE by GPT-NeoX's recipe, and measure how well one fits a text.

Sources: Sennrich, Haddow and Birch, arXiv:1508.07909 (BPE); Radford et al., "Language Models
are Unsupervised Multitask Learners", section 2.2 (bytes); Black et al., arXiv:2204.06745,
section 3.2 (NFC, no prefix space, runs of spaces).
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import tokenizers

from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

PADDING = "<|padding|>"
LONGEST_RUN = 24  # spaces


def train_bpe(texts: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
    """A tokenizer of `vocab_size` ids, learned from `texts` on all cores.

    Ids 0 and 1 are `<|endoftext|>` and `<|padding|>`, the next 256 the bytes, then the merges
    in the order in which they were learned; the last 23 are the runs of 24 to 2 spaces.

    Raises:
        ValueError: if `vocab_size` leaves no room for merges.
    """
    runs = [" " * n for n in range(LONGEST_RUN, 1, -1)]
    fixed = 2 + 256 + len(runs)
    if vocab_size <= fixed:
        raise ValueError(
            f"vocab_size is {vocab_size}; {fixed} ids are bytes, special tokens and runs of "
            f"spaces, so it must be larger"
        )
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(runs),
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # Whole runs are matched before BPE sees the text, so the indentation of code costs one
    # token a line and the space before its first word is not torn off.
    backend.add_tokens([tokenizers.AddedToken(run, normalized=True, special=False) for run in runs])
    return Tokenizer(backend)


class Encodes(Protocol):
    """Anything that turns a text into ids: a `Tokenizer`, a SentencePiece processor."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Fit:
    """How a tokenizer cuts a text."""

    tokens: int
    bytes: int  # of the text as UTF-8
    lines: int  # that are not empty
    seconds: float  # to encode it on the cores the tokenizer takes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def tokens_per_line(self) -> float:
        return self.tokens / self.lines

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds


def measure(tokenizer: Encodes, texts: Iterable[str]) -> Fit:
    """Encode `texts`, count what came out and time it.

    Raises:
        ValueError: if there is no text.
    """
    texts = list(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    if n_bytes == 0:
        raise ValueError("there is no text to measure the tokenizer on")
    start = time.perf_counter()
    if isinstance(tokenizer, Tokenizer):
        tokens = sum(map(len, tokenizer.encode_batch(texts)))
    else:
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
    seconds = time.perf_counter() - start
    lines = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    return Fit(tokens, n_bytes, lines, seconds)
