"""The learning rate as a function of the step."""

import math
from collections.abc import Callable

SHAPES = ("cosine", "linear", "inverse_sqrt", "trapezoid")


def schedule(
    shape: str,
    lr: float,
    *,
    steps: int,
    warmup: int = 0,
    floor: float = 0.0,
    decay: float = 0.4,
) -> Callable[[int], float]:
    """A function from a step (0, 1, ...) to its learning rate.

    All shapes rise linearly to `lr` over `warmup` steps. Then `cosine` and `linear` fall to
    `floor * lr` at the last step, `inverse_sqrt` falls with the square root of the step, and
    `trapezoid` stays at `lr` until the last `decay` of all steps, then falls linearly.

    Args:
        shape: one of `SHAPES`.
        lr: the peak.
        steps: steps of the whole run.
        warmup: steps of the rise.
        floor: last learning rate over the peak.
        decay: part of `steps` in which a trapezoid falls.

    Raises:
        ValueError: if the shape is unknown, a number is out of range, or the warm-up is as long
            as the run.

    Sources: Loshchilov and Hutter, arXiv:1608.03983 (cosine); Vaswani et al.,
    arXiv:1706.03762, section 5.3 (inverse square root); Hu et al., arXiv:2404.06395,
    section 4 (trapezoid, there called warmup-stable-decay).
    """
    if shape not in SHAPES:
        raise ValueError(f"schedule is {shape!r}; it must be one of {', '.join(SHAPES)}")
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be a finite number and not negative")
    if steps < 1:
        raise ValueError(f"steps is {steps}; a run has at least 1")
    if not 0 <= warmup < steps:
        raise ValueError(
            f"warmup is {warmup} steps of {steps}; it must be shorter than the run and not negative"
        )
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; it is a part of lr and must lie in [0, 1]")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; it is a part of the run and must lie in (0, 1]")

    def after_warmup(step: int) -> float:
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        if shape == "inverse_sqrt":
            return math.sqrt(max(1, warmup) / max(1, step))
        if shape == "cosine":
            fallen = (1 - math.cos(math.pi * min(1.0, progress))) / 2
        elif shape == "linear":
            fallen = min(1.0, progress)
        else:
            start = max(warmup, min(steps - 2, round(steps * (1 - decay))))
            fallen = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
        return 1 - (1 - floor) * fallen

    def rate(step: int) -> float:
        return lr * ((step + 1) / warmup if step < warmup else after_warmup(step))

    return rate
