"""Lion: the sign of an interpolated momentum.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675,
algorithm 2.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """One buffer per weight, where AdamW keeps two.

    Every weight moves by exactly `lr` per step, whatever the size of its gradient, so
    learning rates are three to ten times smaller than AdamW's and weight decays
    larger by the same factor (section 5 of the paper).

    Args:
        params: parameters or parameter groups.
        lr: step length of a single weight.
        betas: (b1, b2); b1 mixes the update, b2 the momentum carried to the next step.
        weight_decay: fraction of a weight removed per step, times `lr`.

    Raises:
        ValueError: if `lr` or `weight_decay` is negative or a beta lies outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        for name, beta in zip(("b1", "b2"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; it must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every weight that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (b1, b2), decay = group["lr"], group["betas"], group["weight_decay"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            grads = [weight.grad for weight in weights]
            momenta = [self.state[weight]["momentum"] for weight in weights]
            directions = torch._foreach_lerp(momenta, grads, 1 - b1)
            torch._foreach_sign_(directions)
            torch._foreach_mul_(weights, 1 - lr * decay)
            torch._foreach_add_(weights, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, grads, 1 - b2)  # after its use above: order matters
        return loss
