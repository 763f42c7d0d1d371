"""Named sources with weights: where each row of a training comes from.

A weight says how much of the training is of a source, not how large the source is: a small one
is read again and again, of a large one a part is never read.

Dimensions in this file
    N   rows that are asked for
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

LONGEST_WINDOW = 10_000  # rows


class Mixture:
    """Named sources with weights.

    The rows of a training stand in windows. In each window every source has exactly its share
    of rows, spread evenly with a random offset; which row of the source comes next depends on
    how many of it were drawn before. So everything is a pure function of (seed, place), the
    same for every number of processes, and nothing has to be counted up on the way.

    Args:
        weights: of each source; they need not add up to 1. A source of weight 0 is left out.

    Attributes:
        names: of the sources, in the order of `weights`.
        window: rows over which shares are exact. The smallest number in which all shares are
            whole; where that is above 10,000, 10,000, and shares are rounded to its parts.
        counts: rows of each source in a window, in the order of `names`.

    Raises:
        ValueError: if a weight is negative or not finite, all are 0, or one is too small for
            the longest window.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name} is {weight}; take a finite number >= 0")
        # By their decimals: 0.1 is a tenth here, and not the nearest binary number.
        exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight}
        if not exact:
            raise ValueError(f"no source of {sorted(weights)} has a weight above 0; give one")
        total = sum(exact.values())
        shares = [weight / total for weight in exact.values()]
        self.names = tuple(exact)
        self.window = min(LONGEST_WINDOW, lcm(*(share.denominator for share in shares)))
        self.counts = _apportioned(shares, self.window)
        for name, count, share in zip(self.names, self.counts, shares, strict=True):
            if not count:
                raise ValueError(
                    f"the weight of {name} is {float(share):.2g} of all, less than one row in "
                    f"{self.window:,}; take more, or 0 to leave it out"
                )

    def draw(self, places: np.ndarray, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Which source stands at each place, and how many of it stand before.

        Args:
            places: (N,) int, counted from 0.

        Returns:
            Indices into `names` and counts, (N,) int64 each.
        """
        number, within = np.divmod(places, self.window)
        sources, before = np.empty_like(places), np.empty_like(places)
        for window in np.unique(number):
            here = number == window
            order, ranks = _window(self.counts, (*seed, int(window)))
            sources[here] = order[within[here]]
            before[here] = ranks[within[here]]
        return sources, before + number * np.array(self.counts)[sources]

    def count(self, n_rows: int, seed: tuple[int, ...]) -> np.ndarray:
        """How many of the first `n_rows` are of each source, (len(names),) int64."""
        windows, _ = divmod(n_rows, self.window)
        last, _ = self.draw(np.arange(windows * self.window, n_rows), seed)
        return windows * np.array(self.counts) + np.bincount(last, minlength=len(self.names))


def _apportioned(shares: list[Fraction], window: int) -> tuple[int, ...]:
    """Whole rows of each source, `window` in all: the largest remainders are rounded up."""
    counts = [int(share * window) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - shares[n] * window)
    for n in by_remainder[: window - sum(counts)]:
        counts[n] += 1
    return tuple(counts)


@lru_cache(maxsize=8)
def _window(counts: tuple[int, ...], seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The sources of a window in their order, and how many of the same stand before each."""
    random = np.random.default_rng(seed)
    when = [(np.arange(count) + random.random()) / count for count in counts]
    order = np.argsort(np.concatenate(when), kind="stable")
    sources = np.repeat(np.arange(len(counts)), counts)[order]
    ranks = np.concatenate([np.arange(count) for count in counts])[order]
    return sources, ranks
