"""Lion: the sign of an interpolated momentum.

Sources: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675,
algorithm 2; llm-foundry's `DecoupledLionW` for the decoupled decay; Gupta et al., "Deep
Learning with Limited Numerical Precision", arXiv:1502.02551, for stochastic rounding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "master")
CACHED = 2**18  # numbers of a block on a CPU: all passes over it find it in the cache
AT_ONCE = 2**26  # numbers in one call on a GPU: bounds the temporary memory of a step


class Lion(torch.optim.Optimizer):
    """One buffer per weight, where AdamW keeps two.

    Every weight moves by exactly `lr` per step, whatever the size of its gradient, so
    learning rates are three to ten times smaller than AdamW's and weight decays
    larger by the same factor (section 5 of the paper).

    A gradient that is not a number moves nothing, and leaves a momentum that is none for good:
    that weight never learns again, while the loss stays finite. Look at the norm of the
    gradients before a step.

    A step on weights of 16 bits is computed in float32. A weight of bfloat16 has 8 significant
    bits, and would lose a step below half a unit of the last one. `rounding` says how the
    result is kept:

    - `nearest`: small steps are lost, as in the optimizers of PyTorch. The momentum has the
      dtype of the weight, 2 bytes, and loses small changes too.
    - `stochastic`: a weight is rounded up or down, with the chances that make the mean right,
      and so is its momentum, 2 bytes. Uses the device's default generator. Where processes
      keep copies of one weight, their generators must be in the same state, or the copies
      drift apart.
    - `master`: a float32 copy of the weight takes the step, in the state under `master`, and
      the weight is the copy rounded; with a float32 momentum that is 8 bytes a weight. The copy
      is made at the first step: load weights before it.

    Weights of float32 and float64 are never rounded, and may share a group with others. Sharded
    weights (DTensor) have state that is sharded alike.

    `torch.compile(optimizer.step)` makes one pass of a step, and may round the last bit of a
    momentum differently. With an `lr` that is a tensor of no dimensions, changed in place, it
    compiles once; with a number, again for each new one.

    Args:
        params: parameters or parameter groups.
        lr: step length of a single weight; a number or a tensor of no dimensions.
        betas: (b1, b2); b1 mixes the update, b2 the momentum carried to the next step.
        weight_decay: fraction of a weight removed per step, times `lr`; with `decoupled`, times
            `lr` over the `lr` that the group was made with, which it keeps as `initial_lr`.
        decoupled: decay as llm-foundry does, where a decay of 1e-4 is a large one. Not with
            PyTorch's OneCycleLR, which writes an `initial_lr` of its own.
        rounding: one of `ROUNDINGS`.

    Raises:
        ValueError: if a setting is out of range, or rounding is stochastic for float16.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        rounding: str = "nearest",
    ) -> None:
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, settings | {"decoupled": decoupled, "rounding": rounding})

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with settings of their own; the others are those of the optimizer."""
        check_settings(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", float(group["lr"]))
        for weight in group["params"]:
            if group["rounding"] == "stochastic" and weight.dtype == torch.float16:
                raise ValueError(
                    "rounding is 'stochastic' and a weight is float16; it must be bfloat16, "
                    "or take rounding='master'"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every weight that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            columns: tuple[list, ...] = ([], [], [], [])
            self._init_group(group, *columns)
            lr, decay = group["lr"], group["weight_decay"]
            if group["decoupled"]:
                decay /= group["initial_lr"]
            parts = _alike(*columns)
            if torch.compiler.is_compiling():
                batches = parts  # whole tensors: the compiler makes one pass of the step
            else:
                lr, batches = float(lr), _batches(parts)
            for tensors in batches:
                how = {"lr": lr, "decay": decay, "betas": group["betas"]}
                weights, grads, momenta, *masters = tensors
                if masters:
                    sign_step(masters[0], grads, momenta, **how)
                    torch._foreach_copy_(weights, masters[0])
                elif weights[0].dtype.itemsize < 4:
                    rounded_step(weights, grads, momenta, group["rounding"], **how)
                else:
                    sign_step(weights, grads, momenta, **how)
        return loss

    def _init_group(self, group: dict, weights, grads, momenta, masters) -> None:
        """Append all weights with a gradient, what belongs to them, and None for no master.

        PyTorch's compiler knows this name and runs it as it is, so that it may make state.
        """
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            mastered = group["rounding"] == "master" and weight.dtype.itemsize < 4
            if "momentum" not in state:
                dtype = torch.float32 if mastered else weight.dtype
                state["momentum"] = torch.zeros_like(weight, dtype=dtype)
            if mastered and "master" not in state:
                state["master"] = weight.float()
            weights.append(weight)
            grads.append(weight.grad)
            momenta.append(state["momentum"])
            masters.append(state["master"] if mastered else None)

    def load_state_dict(self, state_dict: dict) -> None:
        """As PyTorch's, which would round float32 state to the dtype of the weight."""
        super().load_state_dict(state_dict)
        saved = chain(*(group["params"] for group in state_dict["param_groups"]))
        weights = chain(*(group["params"] for group in self.param_groups))
        for number, weight in zip(saved, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[weight][name] = value.to(weight.device)


def sign_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    decay: float,
    betas: tuple[float, float],
) -> None:
    """One step of Lion on tensors of one device, in place."""
    b1, b2 = betas
    directions = torch._foreach_mul(momenta, b1)
    torch._foreach_add_(directions, grads, alpha=1 - b1)
    torch._foreach_sign_(directions)
    if decay:
        torch._foreach_mul_(weights, 1 - lr * decay)
    if isinstance(lr, Tensor):  # only a number can be an alpha
        torch._foreach_mul_(directions, lr)
        torch._foreach_sub_(weights, directions)
    else:
        torch._foreach_add_(weights, directions, alpha=-lr)
    torch._foreach_mul_(momenta, b2)  # after its use above: order matters
    torch._foreach_add_(momenta, grads, alpha=1 - b2)


def rounded_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rounding: str,
    **how,
) -> None:
    """`sign_step` in float32 on tensors of 16 bits; what it makes of them is rounded once.

    In 16 bits itself it would be rounded after each operation, and so would some of its
    constants: a b2 of 0.999 becomes 1 in bfloat16.
    """
    weight, grad, momentum = (
        torch.cat([part.reshape(-1) for part in parts]).float()
        for parts in (weights, grads, momenta)
    )
    sign_step([weight], [grad], [momentum], **how)
    for parts, exact in ((weights, weight), (momenta, momentum)):
        if rounding == "stochastic":
            exact = stochastic_round(exact)
        pieces = exact.split([part.numel() for part in parts])
        torch._foreach_copy_(
            parts, [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
        )


def stochastic_round(x: Tensor) -> Tensor:
    """`x`, float32, in bfloat16: up or down at random, so that the mean over draws is `x`.

    A bfloat16 is the upper half of a float32. A random number below one unit of that half is
    added, and the lower half cut off: the chance of a carry is the part that was cut. What is
    bfloat16 already stays. Uses the default generator of the device.
    """
    noise = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()  # a carry could leave the NaNs


def check_settings(group: dict) -> None:
    """Refuse what `Lion` cannot run with; see there."""
    for name in ("lr", "weight_decay"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(
                f"{name} is {float(group[name])}; it must be a finite number and not negative"
            )
    for name, beta in zip(("b1", "b2"), group["betas"], strict=True):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} is {beta}; it must lie in [0, 1), such as 0.9 or 0.99")
    if group["rounding"] not in ROUNDINGS:
        raise ValueError(
            f"rounding is {group['rounding']!r}; it must be one of {', '.join(ROUNDINGS)}"
        )
    if group["decoupled"] and float(group["lr"]) == 0:
        raise ValueError(
            "lr is 0.0 and decoupled decay is in units of it; make Lion with the peak rate"
        )


def _alike(weights, grads, momenta, masters) -> list[list[list[Tensor]]]:
    """Lists of weights, of gradients, of momenta (and of masters) for each dtype and device."""
    parts: dict[tuple, list[list[Tensor]]] = {}
    for weight, grad, *state in zip(weights, grads, momenta, masters, strict=True):
        tensors = [weight, _placed_like(weight, grad), *(t for t in state if t is not None)]
        local = [_local(tensor) for tensor in tensors]
        parts.setdefault((weight.dtype, weight.device), []).append(local)
    return [[list(column) for column in zip(*part, strict=True)] for part in parts.values()]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor; a step is elementwise and needs no more."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _placed_like(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient on the processes where the weight is, summed where it comes in parts."""
    if hasattr(weight, "placements") and grad.placements != weight.placements:
        return grad.redistribute(placements=weight.placements)
    return grad


def _batches(parts: list[list[list[Tensor]]]) -> Iterator[list[list[Tensor]]]:
    """The same in batches of few enough numbers, long tensors cut into blocks."""
    for columns in parts:
        most = CACHED if columns[0][0].device.type == "cpu" else AT_ONCE
        batch: list[Sequence[Tensor]] = []
        room = most
        for tensors in zip(*columns, strict=True):
            for block in _blocks(tensors, most):
                if batch and block[0].numel() > room:
                    yield [list(column) for column in zip(*batch, strict=True)]
                    batch, room = [], most
                batch.append(block)
                room -= block[0].numel()
        yield [list(column) for column in zip(*batch, strict=True)]


def _blocks(tensors: Sequence[Tensor], most: int) -> Iterator[Sequence[Tensor]]:
    """A weight with its gradient and state, cut where they lie one number after another."""
    if tensors[0].numel() <= most or not all(tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    return zip(*(tensor.view(-1).split(most) for tensor in tensors), strict=True)
