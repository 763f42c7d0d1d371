"""What a model takes to answer, and the smallest GPU that holds it.

Dimensions in this file
    T   tokens of the text, question and answer together
"""

from dataclasses import dataclass

from mptbook.model.config import MPTConfig
from mptbook.plan.costs import GPUS, cache_bytes_per_token, weight_bytes
from mptbook.plan.memory import reserve

BITS = (16, 8, 4)


@dataclass(frozen=True)
class Serving:
    """Bytes for one text of T tokens, weights and cache both at `bits` a number."""

    bits: int
    weights: int
    cache_per_token: int
    cache: int
    held_by: tuple[str, ...]  # single GPUs, the smallest first


def serving(config: MPTConfig, row_tokens: int, bits: int = 16) -> Serving:
    """What one text takes. Scales of quantized numbers are not counted: they add 2 to 6 %.

    Args:
        row_tokens: T.
        bits: of a weight, and of a number in the cache.
    """
    weights, each = weight_bytes(config, bits), cache_bytes_per_token(config, bits)
    needed = weights + row_tokens * each
    fits = [name for name, gpu in GPUS.items() if needed + reserve(gpu) <= gpu.memory_bytes]
    fits.sort(key=lambda name: GPUS[name].memory_bytes)
    return Serving(bits, weights, each, row_tokens * each, tuple(fits))
