"""An exported model beside ours: what its engine writes, and how likely we find it."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from mptbook.infer.load import load
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 48, 16  # far enough for the slopes of ALiBi to tell
TEXT = """It was late in the afternoon when the letter came. Nobody had expected it, and for a
while it lay on the table between the cups, unopened, as if it could be sent back."""

# Tokens, and the log-probability of each, in nats: None where an engine does not tell it.
Written = list[tuple[int, float | None]]


@dataclass(frozen=True)
class Comparison:
    """What an engine wrote, judged by ours.

    Args:
        tokens: that it wrote.
        same: of them, those that ours finds the likeliest at their place too.
        difference: the largest between its log-probability of a token and ours, in nats; NaN
            if it told none, or one that is no number.
        behind: the nats that a token lies below the one that ours finds likeliest, at most.
    """

    tokens: int
    same: int
    difference: float
    behind: float


def some_prompt(
    tokenizer: Tokenizer | None, model_tokens: int, vocab_size: int
) -> tuple[list[int], int]:
    """A prompt for a model of so many tokens, and how many there is room for after it."""
    new_tokens = max(1, min(NEW_TOKENS, model_tokens - 1))
    n_tokens = max(1, min(PROMPT_TOKENS, model_tokens - new_tokens))
    if tokenizer is not None:
        return tokenizer.encode(TEXT)[:n_tokens], new_tokens
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (n_tokens,), generator=generator).tolist(), new_tokens


@torch.inference_mode()
def compare(model: MPT, prompt: Sequence[int], written: Written) -> Comparison:
    """What ours says of tokens that an engine wrote to a prompt, the likeliest at each place.

    Ours reads the engine's own tokens, so a difference at one place does not show at the next.

    Raises:
        ValueError: if what ours says is not finite.
    """
    tokens = torch.tensor([token for token, _ in written])
    ids = torch.tensor([*prompt, *tokens[:-1].tolist()])
    logits = model(ids[None])[0, len(prompt) - 1 :].float()
    if not logits.isfinite().all():
        raise ValueError("the model gives logits that are not finite; it is damaged")
    ours = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    same = int((logits.argmax(dim=-1) == tokens).sum())
    behind = float((logits.amax(dim=-1) - logits.gather(1, tokens[:, None])[:, 0]).max())
    pairs = zip(ours.tolist(), (log for _, log in written), strict=True)
    told = torch.tensor([abs(own - log) for own, log in pairs if log is not None])
    difference = float(told.max()) if len(told) else math.nan  # NaN among them is the largest
    return Comparison(len(written), same, difference, behind)


def compared(folder: Path, prompt: Sequence[int], written: Written) -> Comparison:
    """`compare` with the model of a directory, in float32.

    Weights of bfloat16 stay so in memory, and are widened piece by piece.
    """
    model = load(folder)
    if any(weight.dtype != torch.float32 for weight in model.parameters()):  # float16, say
        model = model.float()
    return compare(model, prompt, written)


def engine(name: str) -> ModuleType:
    """An optional package.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this needs {error.name}, which is not here: pip install 'mptbook[export]'; what only "
            "reads the result is not needed with --no-verify"
        ) from None
