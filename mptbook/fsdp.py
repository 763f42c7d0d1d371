"""Fully sharded data parallelism: every process trains on rows of its own, and holds a part of
each weight.

A block's weights are gathered from all processes just before it computes and dropped after it;
its gradients are summed over the processes, and each keeps the part that belongs to its weights.
PyTorch's FSDP2 does the gathering and the summing.

Dimensions in this file
    P   processes: `replicas` groups of equal size; each group holds the weights once

Sources: Rajbhandari et al., "ZeRO", arXiv:1910.02054; Zhao et al., "PyTorch FSDP",
arXiv:2304.11277.
"""

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from mptbook import world
from mptbook.directory import find_directory, load_model, read_config
from mptbook.model.config import MPTConfig
from mptbook.model.init import initialise
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, resolved
from mptbook.weights import read_weights

# By the names of llm-foundry's fsdp_config.mixed_precision. What each process keeps of weights,
# gradients and optimizer state is float32 in all of them.
POLICIES = {
    "full": MixedPrecisionPolicy(cast_forward_inputs=False),
    "default": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    ),
    "pure": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, cast_forward_inputs=False
    ),
}


class Sharding(BaseModel):
    """How a model is split over the processes; without torchrun it is not split."""

    model_config = ConfigDict(extra="forbid")

    replicas: PositiveInt = Field(
        1, description="groups of processes that hold the weights once each; 1: all hold them once"
    )
    precision: Literal["full", "default", "pure"] = Field(
        "full",
        description="full: all in float32, products as precision says; default: gathered weights "
        "in bfloat16, gradients summed in float32; pure: both in bfloat16",
    )
    offload: bool = Field(False, description="keep weights and optimizer in the CPU's memory")
    compile: bool = Field(False, description="compile each block with torch.compile")


def mesh(replicas: int, device_type: str) -> DeviceMesh:
    """All processes, (replicas, P / replicas) where they are not one group.

    Raises:
        ValueError: if the processes do not split into so many groups.
    """
    processes = world.size()
    if processes % replicas:
        raise ValueError(
            f"fsdp.replicas={replicas} does not divide {processes} processes; take a divisor"
        )
    if replicas == 1:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("shard",))
    shape, names = (replicas, processes // replicas), ("replicate", "shard")
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def shard(
    config: MPTConfig,
    sharding: Sharding,
    device: torch.device,
    *,
    weights: str | os.PathLike[str] | None = None,
    recompute: int = 0,
    precision: Precision = "auto",
    adapt: Callable[[MPT], None] | None = None,
) -> MPT:
    """A model of which each process holds its part, in float32.

    It is described first and gets memory when it is split, so that no process ever holds more
    than its part and one whole tensor. All processes must call this at once. Its forward pass
    and `loss` then work as those of any `MPT`; `to_local` and `full_tensor` of a weight give
    this process's part and the whole.

    Args:
        config: the shape.
        sharding: how to split it.
        device: of this process.
        weights: a model directory, run or hub name to read; None fills the weights by the
            recipe of `config` with the CPU's generator, as in a process alone with its state.
        recompute: of every so many blocks one keeps no activations; see `MPT.recompute`.
        precision: of products, which `sharding.precision` must fit.
        adapt: puts adapters into the model while it is only described; they are left unfilled.

    Raises:
        ValueError: if the processes do not split so, the weights do not fit the shape, or the
            precisions contradict each other.
    """
    if sharding.precision != "full" and resolved(device, precision) == "fp32":
        raise ValueError(
            f"fsdp.precision={sharding.precision} gathers weights in bfloat16, but products are "
            f"in float32 (precision={precision} on {device.type}); take fsdp.precision=full, or "
            "precision=bf16"
        )
    with torch.device("meta"):
        model, described = MPT(config), MPT(config)
        if adapt is not None:
            adapt(model)
    model.recompute = recompute
    if sharding.compile:
        for block in model.transformer.blocks:
            # Not the block itself: gathering stays outside of what is compiled.
            block.forward = torch.compile(block.forward)
    pinned = device.type != "cpu"  # memory that a GPU can copy from while it computes
    how: dict[str, Any] = {
        "mesh": mesh(sharding.replicas, device.type),
        "mp_policy": POLICIES[sharding.precision],
        "offload_policy": CPUOffloadPolicy(pinned) if sharding.offload else OffloadPolicy(),
    }
    for block in model.transformer.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed, not averaged: the loss is divided by all targets already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("loss", "hidden", "logits"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device="cpu" if sharding.offload else device)
    model.slopes = model.slopes.to(device)
    if weights is None:
        initialise_parts(model, config)
    else:
        fill(model, read_weights(find_directory(weights), described))
    return model


def load_sharded(
    path: str | os.PathLike[str], sharding: Sharding, device: torch.device, **changes: Any
) -> MPT:
    """As `mptbook.directory.load_model`, split over the processes and in float32.

    A process alone holds all of it.
    """
    if world.size() == 1:
        return load_model(path, torch.float32, device, **changes)
    config = read_config(find_directory(path)).replace(**changes)
    return shard(config, sharding, device, weights=path).eval()


def resharded(model: MPT) -> MPT:
    """The model, each process with its part again of what a pass without gradient has gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return model


@torch.no_grad()
def initialise_parts(model: MPT, config: MPTConfig) -> None:
    """Fill the parts of a sharded model with those of the model that `initialise` makes.

    Layer after layer is filled whole on the CPU, in the order in which `initialise` does, and
    each process takes its part; so every number of processes begins with the same weights.
    """
    for module in model.modules():
        parts = dict(module.named_parameters(recurse=False))
        if not parts:
            continue
        whole = copy.copy(module)
        whole._parameters = {
            name: nn.Parameter(torch.empty(part.shape, device="cpu"))
            for name, part in parts.items()
        } | {name: None for name, part in module._parameters.items() if part is None}
        initialise(whole, config)
        for name, part in parts.items():
            place(part, whole._parameters[name])


@torch.no_grad()
def fill(model: MPT, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give each weight of a sharded model its part of a whole tensor of its name."""
    # A layer that has adapters beside it is their `base_layer`.
    parts = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    for name, whole in weights:
        place(parts[name], whole)


def place(part: Tensor, whole: Tensor) -> None:
    """Copy what belongs to this process of `whole`; every process has it, none sends it."""
    if not isinstance(part, DTensor):
        part.copy_(whole)
        return
    own = part.device_mesh
    whole = whole.to(part.to_local().device, part.dtype)
    local = distribute_tensor(whole, own, part.placements, src_data_rank=None)
    part.to_local().copy_(local.to_local())
