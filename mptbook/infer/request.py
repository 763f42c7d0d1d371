"""What is asked of the engine, and the stream of what it answers."""

import math
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Self

from torch import Tensor

from mptbook.infer.faults import Unanswered
from mptbook.infer.sampling import check_sampling

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to go on.

    Raises:
        ValueError: if a value is out of its range.
    """

    prompt: tuple[int, ...]  # ids, at least one
    max_new_tokens: int = 16  # 0 with echo: only score the prompt
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None  # the same seed gives the same text, whatever else runs beside it
    stop: tuple[str, ...] = ()  # strings that end the text, and are no part of it
    stop_ids: frozenset[int] = frozenset()  # tokens that do
    logprobs: int | None = None  # log-probabilities, and those of so many likeliest tokens
    echo: bool = False  # say the prompt's tokens, too, in pieces without text

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens; give at least one")
        if self.max_new_tokens < (0 if self.echo else 1):
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must have 64 bits at most")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature is {self.temperature}; it must be a number")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; it may be 0 to {MOST_LOGPROBS}")

    def check_fits(self, n_tokens: int, n_ids: int) -> None:
        """See that a slot has room for it, and a tokenizer its tokens.

        Raises:
            ValueError: if not.
        """
        size = len(self.prompt) + self.max_new_tokens
        if size > n_tokens:
            raise ValueError(
                f"{len(self.prompt)} tokens and up to {self.max_new_tokens} more are {size}, "
                f"but there is room for {n_tokens}; shorten the prompt, or ask for fewer"
            )
        for token in self.prompt:
            if not 0 <= token < n_ids:
                raise ValueError(f"{token} is no token; the tokenizer has 0 to {n_ids - 1}")

    def common(self, kept: Sequence[int]) -> int:
        """How many first ids of another text need not be read again for this one.

        The last id of a prompt always is: its logits are wanted. With echo all are.
        """
        wanted = () if self.echo else self.prompt[:-1]
        pairs = zip(wanted, kept, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class Token:
    """A token, and where they were asked for its log-probability and the likeliest ones.

    Log-probabilities are the model's own, in nats, before temperature and cuts; None for the
    first token of a text, which nothing predicts.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # id and log-probability, the likeliest first

    @classmethod
    def of(cls, token: int, logits: Tensor, n_top: int | None) -> Self:
        """A token that (V,) logits predicted; n_top as `Request.logprobs`."""
        if n_top is None:
            return cls(token)
        logprobs = logits.log_softmax(0)
        values, ids = logprobs.topk(min(n_top, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return cls(token, float(logprobs[token]), top)


@dataclass(frozen=True)
class Piece:
    """What a stream yields: text that is certain now, and the tokens chosen since the last."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str | None = None  # of the last piece: stop, length or cancelled


Listener = Callable[[Piece | Unanswered], None]


@dataclass(eq=False)
class Stream:
    """The answer to a request, as it is written.

    Iterate over it for its `Piece`s; that waits for each. A failed request raises `Unanswered`.
    """

    request: Request
    listener: Listener | None = None  # gets the pieces, if there is one
    cancelled: bool = False
    prompt_tokens_reused: int = 0  # that another request had read before
    _pieces: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def cancel(self) -> None:
        """Nobody wants the rest; its slot is free before the next step."""
        self.cancelled = True

    def put(self, piece: Piece | Unanswered) -> None:
        """What the engine calls."""
        (self.listener or self._pieces.put)(piece)

    def ready(self) -> Iterator[Piece]:
        """The pieces that are there already."""
        while not self._pieces.empty():
            piece = self._pieces.get()
            if isinstance(piece, Unanswered):
                raise piece
            yield piece

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            if isinstance(piece, Unanswered):
                raise piece
            yield piece
            if piece.finish is not None:
                return


@dataclass
class Counts:
    """What happened since the engine was made."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    reused_tokens: int = 0  # of prompts, that were in a slot already
    finished: dict[str, int] = field(default_factory=dict)  # by reason

    def end(self, finish: str) -> None:
        """Note how one request ended."""
        self.finished[finish] = self.finished.get(finish, 0) + 1
