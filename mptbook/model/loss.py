"""The loss of the last linear layer, without the logits of all tokens in memory.

For 4,096 tokens and 50,432 words the logits are 0.8 GB in float32, and the gradient as much
again. Here they are made for a few tokens at a time, and what the backward pass needs is computed
at once: the loss is a sum, so its gradient with respect to the logits is known with it.

Dimensions in this file
    N   tokens
    D   width of the residual stream
    V   vocabulary
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mptbook.data.packing import IGNORE

ROWS = 1024  # tokens at a time; with fewer, adding up the weight's gradients takes over


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0
) -> Tensor:
    """Sum over all targets of minus the log-probability of each, in nats.

    As ``cross_entropy(factor * hidden @ weight.T, targets, reduction="sum")``. Logits are rounded
    to the dtype of `hidden`, or to autocast's; what follows is float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64; -100 costs nothing.
        factor: of the logits.

    Returns:
        A scalar, float32 or wider.

    Raises:
        IndexError: from PyTorch, on a CPU, if a target is neither -100 nor in the vocabulary.
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return LinearCrossEntropy.apply(hidden, weight, targets, factor, dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """The forward and backward pass of `linear_cross_entropy`, products in a given dtype."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, factor, dtype):
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        low_weight = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        wide = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if of_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for rows in (slice(at, at + ROWS) for at in range(0, len(hidden), ROWS)):
            x, counts = hidden[rows].to(dtype), targets[rows] != IGNORE
            target = targets[rows].where(counts, 0)[:, None]  # (n, 1)
            logits = (x @ low_weight.T).to(wide) * factor
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, target) - largest
            exps = logits.sub_(largest).exp_()
            sums = exps.sum(1, keepdim=True)
            total += ((sums.log() - chosen)[:, 0] * counts).sum()
            if not (of_hidden or of_weight):
                continue
            # With respect to the logits: their probability, less 1 where the target is.
            grad = exps.mul_(factor * counts[:, None] / sums)
            grad.scatter_add_(1, target, -factor * counts[:, None].to(wide))
            grad = grad.to(dtype)
            if of_hidden:
                grad_hidden[rows] = grad @ low_weight
            if of_weight:
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
