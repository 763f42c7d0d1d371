"""Requests that have a slot, and which of them are read together."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mptbook.infer.faults import NOT_FINITE, Unanswered
from mptbook.infer.request import Piece, Request, Stream, Token
from mptbook.infer.sampling import sample
from mptbook.infer.slots import Slots
from mptbook.infer.text import TextStream
from mptbook.tokenizer.tokenizer import Tokenizer


@dataclass(eq=False)
class Running:
    """A request in a slot."""

    stream: Stream
    slot: int
    read: int  # tokens of the prompt that are read
    text: TextStream
    generator: torch.Generator
    born: float
    written: int = 0
    last: int = -1  # token that was chosen, and not read yet
    predicted: Tensor | None = None  # with echo: logits after the tokens read so far
    spoken: float = 0.0  # when
    alone: bool = False  # reading it together with others has failed

    @classmethod
    def begin(
        cls, stream: Stream, slot: int, read: int, born: float, tokenizer: Tokenizer
    ) -> "Running":
        """A request whose slot holds the first tokens of its prompt, `read` of them."""
        generator, seed = torch.Generator(), stream.request.seed
        generator.manual_seed(generator.seed() if seed is None else seed)
        text = TextStream(tokenizer, stream.request.stop)
        return cls(stream, slot, read, text, generator, born)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.stream.request.prompt

    @property
    def joins(self) -> bool:
        """Whether its prompt may be read in one pass with others: nothing of it is read yet."""
        return not (self.read or self.alone or self.stream.request.echo)

    def choose(self, best: int | None, logits: Tensor, row: int, n_ids: int) -> Token:
        """The next token: the likeliest, or one that is sampled.

        Args:
            best: what `likeliest` says of the row.
            logits: (R, V), of which this one's are the first n_ids of a row.

        Raises:
            Unanswered: if they are not finite.
        """
        if best is None:
            raise Unanswered(NOT_FINITE)
        request = self.stream.request
        if request.temperature == 0 and request.logprobs is None:
            # To cut out a row takes PyTorch as long as all else that a token still needs.
            return Token(best)
        # Where the generator is: a seed gives the same text on any device.
        own = logits[row, :n_ids].cpu()
        if request.temperature > 0:
            how = {"temperature": request.temperature, "top_k": request.top_k}
            how |= {"top_p": request.top_p, "generator": self.generator}
            best = int(sample(own[None], **how))
        return Token.of(best, own, request.logprobs)

    def echo(self, chunk: Sequence[int], logits: Tensor) -> None:
        """Say the tokens of a chunk of the prompt, each with what was predicted for it.

        Args:
            logits: (len(chunk), V), after each of them.
        """
        if not logits.isfinite().all():
            raise Unanswered(NOT_FINITE)
        n_top, first = self.stream.request.logprobs, self.predicted
        said = [Token(chunk[0]) if first is None else Token.of(chunk[0], first, n_top)]
        rows = zip(chunk[1:], logits[:-1], strict=True)
        said += [Token.of(token, row, n_top) for token, row in rows]
        self.predicted = logits[-1]
        self.stream.put(Piece("", tuple(said)))


def longest(request: Request, kept: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The slot that holds the longest beginning of a prompt, and how many tokens that is."""
    common = [request.common(ids) for ids in kept]
    return max(enumerate(common), key=lambda pair: pair[1])


def place(
    request: Request, free: Sequence[int], kept: Sequence[Sequence[int]], used: Sequence[int]
) -> tuple[int, int, int]:
    """A free slot for a request, the slot to copy its beginning from, and how many tokens that is.

    Args:
        kept: ids that each slot holds.
        used: when each was used last.
    """
    source, n = longest(request, kept)
    common = {slot: request.common(kept[slot]) for slot in free}
    # Going on in a slot loses what it holds beyond the beginning: nothing of it may be, or it is
    # the slot that was used longest ago, whose turn it is.
    oldest = min(free, key=lambda slot: used[slot])
    for slot in (*free, oldest):
        if common[slot] == n and (len(kept[slot]) == n or slot == oldest):
            return slot, slot, n
    return oldest, source, n


def settle(
    stream: Stream,
    born: float,
    free: Sequence[int],
    used: Sequence[int],
    slots: Slots,
    kept: list[list[int]],
    tokenizer: Tokenizer,
) -> Running:
    """A request in a free slot, which may hold the beginning of its prompt; see `place`."""
    slot, source, read = place(stream.request, free, kept, used)
    kept[slot] = []  # should what follows fail
    if source != slot:
        slots.copy(source, slot, read)
    slots.crop(slot, read)
    kept[slot] = list(stream.request.prompt[:read])
    stream.prompt_tokens_reused = read
    return Running.begin(stream, slot, read, born, tokenizer)


def take_over(one: Running, slots: Slots, kept: list[list[int]]) -> int:
    """Copy the beginning of a prompt from a slot that has read it since this was admitted.

    Returns:
        How many tokens need not be read for it.
    """
    source, read = longest(one.stream.request, kept)
    new = read - one.read
    if new <= 0:
        return 0
    slots.copy(source, one.slot, read)
    one.read, kept[one.slot] = read, list(one.prompt[:read])
    one.stream.prompt_tokens_reused += new
    return new


def read_together(reading: deque[Running], room: int) -> list[Running]:
    """Those whose prompts are read in one pass: the first of the queue at least.

    Others join it if both prompts are whole, and fit into so many tokens. One that begins like
    another waits, to take the beginning over.
    """
    first = reading[0]
    taken, room = [first], room - len(first.prompt) if first.joins else 0
    for one in islice(reading, 1, None):
        alike = max(one.stream.request.common(each.prompt) for each in taken)
        if one.joins and len(one.prompt) <= room and 2 * alike < len(one.prompt):
            taken.append(one)
            room -= len(one.prompt)
    return taken
