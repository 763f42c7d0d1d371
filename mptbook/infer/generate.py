"""Continue texts with a model."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory
from mptbook.infer.engine import Engine
from mptbook.infer.load import BitsSetting, load
from mptbook.infer.request import Request, Stream
from mptbook.infer.sampling import check_sampling
from mptbook.infer.slots import CHUNK, Slots
from mptbook.infer.text import check_vocabulary
from mptbook.model.mpt import MPT
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

SIDE_BY_SIDE = 32  # sequences at most; the rest wait for their turn


def generate(
    model: MPT,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Prompts of unequal length are read together; what comes out for one does not depend on
    the others, but for rounding. A continuation ends before an end-of-text token.

    Args:
        prompts: one or many; an empty one asks for a new document.
        max_new_tokens: tokens at most.
        temperature, top_k, top_p: see `mptbook.infer.sampling.sample`.
        seed: the same seed gives the same text, to each prompt by its place.
        stop: a string that ends a continuation, and is no part of it; or several.

    Raises:
        ValueError: if a sampling value is out of its range, or a model with learned positions
            runs out of them.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop}
    requests = [
        _request(tokenizer, prompt, max_new_tokens, seed + row, **how)
        for row, prompt in enumerate(prompts)
    ]
    return [completion.text for completion in complete(model, tokenizer, requests)]


def stream(
    model: MPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
) -> Iterator[str]:
    """As `generate` for one prompt, but the text comes in pieces, as soon as it is certain.

    A token may end within a character; such a piece waits for the rest of it.
    """
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop": stop}
    request = _request(tokenizer, prompt, max_new_tokens, seed, **how)
    engine, (stream,) = _submit(model, tokenizer, [request])
    working = True
    while working:
        working = engine.step()  # or it has failed, which is to be told
        for piece in stream.ready():
            yield piece.text


@dataclass(frozen=True)
class Completion:
    text: str  # without what ended it
    ids: tuple[int, ...]  # with what ended it
    finish: str  # stop, or length: the tokens are used up


def complete(model: MPT, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Completion]:
    """The answers to requests, in their order; up to `SIDE_BY_SIDE` are written at once.

    Raises:
        ValueError: if a model with learned positions runs out of them, or lacks ids.
        Unanswered: if a request could not be finished.
    """
    if not requests:
        return []
    engine, streams = _submit(model, tokenizer, requests)
    while engine.step():
        pass
    found = []
    for stream in streams:
        pieces = list(stream)
        ids = tuple(token.id for piece in pieces for token in piece.tokens)
        text = "".join(piece.text for piece in pieces)
        found.append(Completion(text, ids, pieces[-1].finish))
    return found


def _submit(
    model: MPT, tokenizer: Tokenizer, requests: Sequence[Request]
) -> tuple[Engine, list[Stream]]:
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    config = model.config
    check_vocabulary(tokenizer, config.vocab_size)
    if config.has_positions and longest > config.max_seq_len:
        raise ValueError(
            f"{longest} tokens, but learned positions end at max_seq_len={config.max_seq_len}; "
            "shorten the text, or use ALiBi"
        )
    slots = Slots(model, min(len(requests), SIDE_BY_SIDE), longest)
    engine = Engine(slots, tokenizer, chunk_tokens=CHUNK, queue=len(requests))
    return engine, [engine.submit(request) for request in requests]


def _request(
    tokenizer: Tokenizer, prompt: str, max_new_tokens: int, seed: int, stop, **how
) -> Request:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    ids = tuple(tokenizer.encode(prompt)) or (tokenizer.end_of_text,)
    ends = frozenset({tokenizer.end_of_text})
    return Request(ids, max_new_tokens, seed=seed, stop=stop, stop_ids=ends, **how)


class Generate(RunSettings):
    """Continue a prompt, printing as it goes: `mptbook generate DIR --prompt "..."`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    prompt: str = Field("", description="text to continue; empty for a new document")
    max_new_tokens: PositiveInt = Field(128, description="tokens at most")
    temperature: NonNegativeFloat = Field(0.8, description="0 takes the most likely token")
    top_k: PositiveInt | None = Field(None, description="choose among the k most likely")
    top_p: float | None = Field(0.95, description="choose among the likeliest that reach p")
    seed: int = Field(0, description="the same seed gives the same text")
    stop: list[str] = Field([], description="strings that end the text")
    bits: BitsSetting | None = Field(
        None, description="of a weight: 16, 8 or 4; none: as it is stored"
    )

    def run(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        model = load(self.model, self.bits)
        tokenizer = Tokenizer.load(find_directory(self.model))
        sampling = self.model_dump(exclude={"model", "prompt", "bits"})
        sys.stdout.write(self.prompt)
        for piece in stream(model, tokenizer, self.prompt, **sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
