"""Two processes train sharded; `test_lion_sharded.py` starts this and compares.

Usage: torchrun --standalone --nproc-per-node 2 sharded.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    distribute_tensor,
    init_device_mesh,
)

from mptbook.optim.lion import Lion

KINDS = {
    "float32": {"decoupled": True, "weight_decay": 0.01},
    "nearest": {"rounding": "nearest", "weight_decay": 0.3},
    "master": {"rounding": "master", "weight_decay": 0.3},
}


def make(kind, seed=0, shard=lambda model: model):
    """A model whose shards are of unequal length, and its optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.GELU(), torch.nn.Linear(7, 1))
    model = shard(model if kind == "float32" else model.bfloat16())
    return model, Lion(model.parameters(), lr=0.02, **KINDS[kind])


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        # The same rows in each process: the mean over processes is exact.
        model(x.to(next(model.parameters()).dtype)).float().square().mean().backward()
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def save(folder, model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder, model, optimizer):
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def whole(model, optimizer):
    """Weights and state of all processes together, by name."""
    found = {}
    for name, weight in model.named_parameters():
        found[name] = weight.detach()
        found |= {f"{name}:{key}": value for key, value in optimizer.state[weight].items()}
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in found.items()}


def step_on_a_gradient_in_parts(mesh):
    """A weight that each process holds whole, its gradient as addends: 3 - 1 and -3 + 1."""
    weight = torch.nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
    part = torch.tensor([3.0, -3.0]) if dist.get_rank() == 0 else torch.tensor([-1.0, 1.0])
    weight.grad = DTensor.from_local(part, mesh, [Partial("sum")])
    optimizer = Lion([weight], lr=0.5)
    optimizer.step()
    return [weight.to_local().detach(), optimizer.state[weight]["momentum"].to_local()]


def main(folder):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for kind in KINDS:
        model, optimizer = make(kind, shard=lambda model: fully_shard(model, mesh=mesh))
        train(model, optimizer, range(3))
        save(folder / f"two-{kind}", model, optimizer)
        train(model, optimizer, range(3, 6))
        results[kind] = whole(model, optimizer)
        state = optimizer.state[next(model.parameters())]
        results[f"{kind} shard"] = {key: value.to_local().shape for key, value in state.items()}
        model, optimizer = make(kind, seed=1, shard=lambda model: fully_shard(model, mesh=mesh))
        load(folder / f"one-{kind}", model, optimizer)
        train(model, optimizer, range(3, 6))
        results[f"{kind} loaded"] = whole(model, optimizer)
    results["parts"] = step_on_a_gradient_in_parts(mesh)
    torch.save(results, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
