"""What a model makes of a long text: loss by position, retrieval, and questions about a book.

Dimensions in this file
    T   tokens of a text
    N   items of a task at one place
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg
from torch import Tensor

from mptbook.data.sources import decode
from mptbook.directory import find_directory, load_model
from mptbook.eval.recall import Choice, book_question, key_values
from mptbook.infer.cache import KVCache
from mptbook.infer.text import check_vocabulary
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.settings import RunSettings, check_figures
from mptbook.tokenizer.tokenizer import Tokenizer

PLACES = {"begin": 0.1, "middle": 0.5, "end": 0.9}  # part of the text that stands before
UNREAD = "unread"
TASKS = "key_values", "book"
AT_ONCE = 16_384  # tokens that are read before the cache holds them


@torch.no_grad()
def loss_by_position(
    model: MPT,
    ids: Sequence[int],
    positions: Sequence[int],
    *,
    spans: int = 32,
    span_tokens: int = 256,
    precision: Precision = "auto",
) -> list[float]:
    """Nats per token of the same tokens, by how many of the text the model has read before.

    Spans of the text are each predicted again and again, with more and more of what stands
    before them. So all positions are measured on the same tokens, and what differs is the
    context alone: along a single reading, the text itself is now easy and now hard.

    Args:
        ids: T tokens, read as rows whatever the model's `max_seq_len`.
        positions: of the first token of a span, the number of tokens before it, at least 1.
        spans: how many, evenly over what lies behind the last position.
        span_tokens: tokens of each.

    Returns:
        One mean for each position.

    Raises:
        ValueError: if a position is below 1, or the text too short.
    """
    if min(positions) < 1:
        raise ValueError(f"a position is {min(positions)}; take at least 1, what stands before")
    last = len(ids) - span_tokens
    if last < max(positions):
        raise ValueError(
            f"a span of {span_tokens} tokens behind position {max(positions)} needs "
            f"{max(positions) + span_tokens} tokens, the text has {len(ids)}"
        )
    text = torch.tensor(ids)
    begins = torch.linspace(max(positions), last, spans).long()
    means = []
    for position in positions:
        rows = torch.stack([text[n - position : n + span_tokens] for n in begins.tolist()])
        at_once = max(1, AT_ONCE // rows.shape[1])
        losses = [_span_loss(model, part, span_tokens, precision) for part in rows.split(at_once)]
        means.append(float(torch.cat(losses).mean()))
    return means


def _span_loss(model: MPT, rows: Tensor, span_tokens: int, precision: Precision) -> Tensor:
    """Nats of the last tokens of each row, (B, span_tokens)."""
    model.eval()
    x, y = rows[:, :-1].to(model.device), rows[:, -span_tokens:].to(model.device)
    with autocast(model.device, precision):
        # At once and without a cache: queries and keys that are as many are attended to fastest.
        logits = model.logits(model.hidden(x)[:, -span_tokens:])
    return F.cross_entropy(logits.float().transpose(1, 2), y, reduction="none").cpu()


@torch.no_grad()
def chosen(
    model: MPT, tokenizer: Tokenizer, choices: Sequence[Choice], *, precision: Precision = "auto"
) -> list[int]:
    """Which option the model thinks likeliest per token, for each of the choices.

    A context that several choices share one after the other is read once.
    """
    model.eval()
    answers: list[int] = []
    cache, read = None, None
    for choice in choices:
        if choice.context != read:
            cache, read = KVCache(model.config.n_layers), choice.context
            ids = tokenizer.encode(choice.context) or [tokenizer.end_of_text]
            with autocast(model.device, precision):
                for start in range(0, len(ids) - 1, AT_ONCE):
                    part = ids[start : min(start + AT_ONCE, len(ids) - 1)]
                    model.hidden(torch.tensor([part], device=model.device), cache=cache)
        answers.append(_likeliest(model, tokenizer, cache, ids[-1], choice, precision))
    return answers


def _likeliest(
    model: MPT,
    tokenizer: Tokenizer,
    cache: KVCache,
    last: int,
    choice: Choice,
    precision: Precision,
) -> int:
    question, read = tokenizer.encode(choice.question), len(cache)
    means = []
    for option in choice.options:
        answer = tokenizer.encode(option)
        text = torch.tensor([[last, *question, *answer]], device=model.device)
        with autocast(model.device, precision):
            logits = model(text[:, :-1], cache=cache)[0, -len(answer) :]
        means.append(float(F.cross_entropy(logits.float(), text[0, -len(answer) :])))
        cache.crop(read)
    return means.index(min(means))


def examine(
    model: MPT,
    tokenizer: Tokenizer,
    book: str,
    *,
    positions: Sequence[int],
    tokens: Sequence[int],
    spans: int = 32,
    questions: int = 20,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    precision: Precision = "auto",
) -> dict:
    """Loss by position and tasks, printed and returned.

    Args:
        positions, spans: of `loss_by_position`.
        tokens: lengths of context for the tasks.
        questions: at each length and place.
        tasks: of `TASKS`; ``key_values`` asks nothing about the book.
        seed: of the questions.

    Returns:
        ``losses``; and for each task the share of right answers by length and place, and under
        ``UNREAD`` that of the same questions without the context, which a good guess gets right.
    """
    ids = tokenizer.encode(book)
    losses = loss_by_position(model, ids, positions, spans=spans, precision=precision)
    print(f"nats per token of {spans} spans of a text of {len(ids):,} tokens, after")
    for position, loss in zip(positions, losses, strict=True):
        print(f"  {position:7,} tokens  {loss:6.3f}")
    if tasks:
        print(f"right answers of {questions}, a quarter by chance\n{'':24}", end="")
        print("  ".join(f"{place:>6}" for place in (*PLACES, UNREAD)))
    shares_of: dict[str, dict] = {task: {} for task in tasks}
    for task, found in shares_of.items():
        for length in tokens:
            found[length], unread = {}, 0
            for place, part in PLACES.items():
                asked = [
                    book_question(book, tokenizer, length, part, seed + n)
                    if task == "book"
                    else key_values(tokenizer, length, part, seed + n)
                    for n in range(questions)
                ]
                right = _right(model, tokenizer, asked, precision)
                found[length][place] = right / questions
                guessed = [replace(one, context="") for one in asked]
                unread += _right(model, tokenizer, guessed, precision)
            found[length][UNREAD] = unread / questions / len(PLACES)
            shares = "  ".join(f"{share:6.0%}" for share in found[length].values())
            print(f"  {task:10}  {length:8,}  {shares}", flush=True)
    return {"losses": losses} | shares_of


def _right(model: MPT, tokenizer: Tokenizer, asked: Sequence[Choice], precision: Precision) -> int:
    answers = chosen(model, tokenizer, asked, precision=precision)
    return sum(a == one.right for a, one in zip(answers, asked, strict=True))


class LongContext(RunSettings):
    """What a model makes of a long text: `mptbook longcontext DIR --book book.txt`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    book: Path = Field(description="a text file; best one that the model was not trained on")
    positions: list[PositiveInt] = Field(
        [64, 256, 512, 1024, 2048, 4096, 8192], description="tokens read before, for the loss"
    )
    tokens: list[PositiveInt] = Field(
        [512, 2048, 8192], description="lengths of context for the questions"
    )
    spans: PositiveInt = Field(32, description="parts of the book to find the loss of")
    questions: PositiveInt = Field(20, description="at each length and place")
    seed: int = Field(0, description="of the questions")
    precision: Precision = Field("auto", description="auto: bf16 where the device has units for it")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        if self.out is not None:
            check_figures(self.out)
        book = decode(str(self.book), self.book.read_bytes())
        model = load_model(self.model)
        tokenizer = Tokenizer.load(find_directory(self.model))
        check_vocabulary(tokenizer, model.config.vocab_size)
        figures = examine(
            model,
            tokenizer,
            book,
            positions=self.positions,
            tokens=self.tokens,
            spans=self.spans,
            questions=self.questions,
            seed=self.seed,
            precision=self.precision,
        )
        if self.out is not None:
            figures = self.model_dump(mode="json", exclude={"out"}) | figures
            self.out.write_text(json.dumps(figures, indent=1) + "\n")
            print(f"written to {self.out}")
