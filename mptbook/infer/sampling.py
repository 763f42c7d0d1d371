"""From logits to the next token.

Dimensions in this file
    B   batch
    V   vocabulary

Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv:1904.09751
(nucleus sampling, top-p).
"""

import math

import torch
from torch import Tensor

FEW = 1024
LEAST = 1e-30  # what float32 can still divide by; as certain as 0, but equals share


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0 takes the most likely token, the first of equals.
        top_k: choose among the k most likely tokens only.
        top_p: choose among the fewest tokens whose probabilities reach p together.
        generator: source of randomness.

    Returns:
        (B,) int64.

    Raises:
        ValueError: if a value is out of its range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=1)
    # Below zero before they are divided, so that no temperature makes infinities of them.
    below = logits.float() - logits.amax(dim=1, keepdim=True)
    probabilities = (below / max(temperature, LEAST)).softmax(dim=1)
    if top_k is None and top_p is None:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    ordered, tokens = _largest(probabilities, top_k, top_p)
    if top_p is not None:
        reached = ordered.cumsum(dim=1)[:, :-1]  # before each but the first, which always stays
        ordered[:, 1:][reached >= top_p] = 0
    choice = torch.multinomial(ordered, 1, generator=generator)
    return tokens.gather(1, choice)[:, 0]


def likeliest(logits: Tensor, n_ids: int) -> list[int | None]:
    """The most likely of the first n_ids tokens for each row of logits, the first of equals.

    Args:
        logits: (B, V) float32.

    Returns:
        None for a row that is not finite.
    """
    if logits.device.type == "cpu":  # NumPy takes a tenth of the time that PyTorch does
        logits = logits.numpy()
    logits = logits[:, :n_ids]
    best, total = logits.argmax(1), logits.sum(1)
    # No sum with infinities or NaN is finite; all other sums of logits are.
    rows = zip(best.tolist(), total.tolist(), strict=True)
    return [token if math.isfinite(number) else None for token, number in rows]


def _largest(
    probabilities: Tensor, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of each row, falling: k of them, or as many as reach p, and more."""
    n = probabilities.shape[1]
    if top_k is not None:
        return probabilities.topk(min(top_k, n), dim=1)
    # Sorting a vocabulary takes milliseconds, and few tokens are needed.
    ordered, tokens = probabilities.topk(min(FEW, n), dim=1)
    if bool((ordered.sum(dim=1) >= top_p).all()):
        return ordered, tokens
    return probabilities.sort(dim=1, descending=True)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a ValueError that names what is out of its range."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or larger")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least one token must remain")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
