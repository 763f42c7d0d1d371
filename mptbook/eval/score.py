"""Log-likelihoods of continuations, and continuations themselves, of prompts that share a begin.

What several rows of a batch have in common is read once: the options of a question share the
question, and the questions of a task share its examples.

Dimensions in this file
    B   contexts of a batch
    L   tokens of a continuation
    V   vocabulary
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mptbook.eval.prefix import Prefix, left_padded
from mptbook.eval.reader import Reader

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    nats: float  # the logarithm of its probability
    tokens: int
    greedy: bool  # each of its tokens is the likeliest at its place
    truncated: bool = False  # the context did not fit, and lost its begin


@dataclass
class Context:
    """A context and the continuations that are asked for; both as ids, neither empty."""

    ids: list[int]
    continuations: list[list[int]]
    places: list[int] = field(default_factory=list)  # of each in the answer
    truncated: bool = False


Report = Callable[[int], None]  # told how many more are done


def likelihoods(
    reader: Reader,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    share: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    report: Report = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, in the order of `pairs`.

    Args:
        pairs: ids of contexts and continuations, neither empty. What is longer than the reader's
            `max_tokens` loses its begin, as in lm-evaluation-harness.
        share: read what contexts have in common once. False reads every pair by itself, which
            any model can; it is slower, and equal but for rounding.
        batch_tokens: of context and continuation, over all rows at a time.
        report: called with the number of pairs that were scored since.

    Raises:
        ValueError: if a context or continuation is empty.
    """
    found: list[Likelihood | None] = [None] * len(pairs)
    prefix = Prefix(reader)
    contexts = _contexts(pairs, reader.max_tokens, share)
    parts = [part for context in contexts for part in _parts(context, batch_tokens)]
    for batch in _batches(parts, batch_tokens):
        score = _score_shared(prefix, batch) if share else _score_apart(reader, batch)
        answers = itertools.chain.from_iterable(score)
        whose = [(context, place) for context in batch for place in context.places]
        for (context, place), (nats, tokens, greedy) in zip(whose, answers, strict=True):
            found[place] = Likelihood(nats, tokens, greedy, context.truncated)
        report(sum(len(context.places) for context in batch))
    return found


def _contexts(
    pairs: Sequence[tuple[list[int], list[int]]], max_tokens: int, share: bool
) -> list[Context]:
    """Pairs with equal contexts together; longest first, so that memory runs out soon or never."""
    contexts: dict[object, Context] = {}
    for place, (ids, continuation) in enumerate(pairs):
        if not ids or not continuation:
            raise ValueError(
                f"pair {place} has an empty context or continuation; both need a token"
            )
        kept = max(1, max_tokens + 1 - len(continuation))
        cut = ids[-kept:]
        key = tuple(cut) if share else place
        context = contexts.setdefault(key, Context(cut, [], truncated=len(cut) < len(ids)))
        context.continuations.append(continuation)
        context.places.append(place)
    return sorted(contexts.values(), key=lambda one: -len(one.ids))


def _parts(context: Context, batch_tokens: int) -> Iterator[Context]:
    """The same context with as many of its continuations at a time as a batch can hold."""
    pairs = sorted(
        zip(context.continuations, context.places, strict=True), key=lambda p: -len(p[0])
    )
    while pairs:
        width = len(context.ids) + len(pairs[0][0])
        rows = max(1, batch_tokens // width)
        taken, pairs = pairs[:rows], pairs[rows:]
        yield Context(context.ids, *map(list, zip(*taken, strict=True)), context.truncated)


def _batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[Context]]:
    batch: list[Context] = []
    rows = longest = 0
    for context in contexts:
        tail = max(longest, *map(len, context.continuations))
        width = len((batch or [context])[0].ids) + tail
        if batch and (rows + _rows(context)) * width > batch_tokens:
            yield batch
            batch, rows, tail = [], 0, max(map(len, context.continuations))
        batch.append(context)
        rows, longest = rows + _rows(context), tail
    if batch:
        yield batch


def _rows(context: Context) -> int:
    """How many rows are read of a context: of options that are one token, the context tells all."""
    return len(context.continuations) if max(map(len, context.continuations)) > 1 else 1


Scored = list[tuple[float, int, bool]]


def _score_shared(prefix: Prefix, batch: Sequence[Context]) -> Iterator[Scored]:
    reader = prefix.reader
    ids, mask, cache = prefix.spread([context.ids for context in batch])
    first = reader.logits(ids, mask, cache, keep=1)  # (B, 1, V)
    counts = [len(context.continuations) for context in batch]
    owner = torch.arange(len(batch)).repeat_interleave(torch.tensor(counts)).to(reader.device)
    continuations = [one for context in batch for one in context.continuations]
    longest = max(map(len, continuations))
    rest = None
    if longest > 1:
        cache.batch_select_indices(owner)
        block = torch.zeros(len(continuations), longest - 1, dtype=torch.int64)
        for row, one in enumerate(continuations):
            block[row, : len(one) - 1] = torch.tensor(one[:-1])
        # Padding stands right of everything, where no token looks.
        mask = torch.cat([mask[owner], torch.ones_like(block, dtype=torch.bool).to(mask)], dim=1)
        rest = reader.logits(block.to(reader.device), mask, cache, keep=longest - 1)
    scored = []
    for row, one in enumerate(continuations):
        logits = first[owner[row]]
        if len(one) > 1:
            logits = torch.cat([logits, rest[row, : len(one) - 1]])
        scored.append(_of(logits, one))
    numbers = iter(scored)
    for count in counts:
        yield list(itertools.islice(numbers, count))


def _score_apart(reader: Reader, batch: Sequence[Context]) -> Iterator[Scored]:
    """Without a cache: every row is a context and its continuation but for the last token."""
    rows = [context.ids + one[:-1] for context in batch for one in context.continuations]
    ids, mask = left_padded(rows, reader.device)
    longest = max(len(one) for context in batch for one in context.continuations)
    logits = iter(reader.logits(ids, mask, None, keep=longest))
    for context in batch:
        yield [_of(next(logits)[-len(one) :], one) for one in context.continuations]


def _of(logits: Tensor, continuation: list[int]) -> tuple[float, int, bool]:
    """Nats, tokens and greediness of a continuation from its (L, V) logits."""
    tokens = torch.tensor(continuation, device=logits.device)
    nats = logits.float().log_softmax(-1).gather(1, tokens[:, None]).sum()
    return float(nats), len(continuation), bool((logits.argmax(-1) == tokens).all())


@torch.no_grad()
def continuations(
    reader: Reader,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = ("\n",),
    batch_tokens: int = BATCH_TOKENS,
    report: Report = lambda done: None,
) -> list[str]:
    """What the model writes after each prompt, always its likeliest token, up to a stop.

    A text ends before the first of `stop` in it, or before a token that ends a document.
    """
    contexts = []
    for place, prompt in enumerate(prompts):
        ids = reader.encode(prompt) or [reader.start]
        kept = ids[-max(1, reader.max_tokens - max_new_tokens) :]
        contexts.append(Context(kept, [[0] * max_new_tokens], [place], len(kept) < len(ids)))
    contexts.sort(key=lambda one: -len(one.ids))
    written = [""] * len(prompts)
    prefix = Prefix(reader)
    for batch in _batches(contexts, batch_tokens):
        texts = _write(prefix, [context.ids for context in batch], max_new_tokens, stop)
        for context, text in zip(batch, texts, strict=True):
            written[context.places[0]] = text
        report(len(batch))
    return written


def _write(
    prefix: Prefix, contexts: list[list[int]], max_new_tokens: int, stop: Sequence[str]
) -> list[str]:
    reader = prefix.reader
    ids, mask, cache = prefix.spread(contexts)
    n_ids = len(reader.tokenizer)  # a padded vocabulary has more, which are no text
    out: list[list[int]] = [[] for _ in contexts]
    ended = [False] * len(contexts)
    for _ in range(max_new_tokens):
        tokens = reader.logits(ids, mask, cache, keep=1)[:, 0, :n_ids].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if not ended[row] and token not in reader.ends:
                out[row].append(token)
                ended[row] = any(mark in reader.decode(out[row]) for mark in stop)
            else:
                ended[row] = True
        if all(ended):
            break
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return [_until(reader.decode(row), stop) for row in out]


def _until(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for mark in stop if (at := text.find(mark)) >= 0), default=len(text))]
