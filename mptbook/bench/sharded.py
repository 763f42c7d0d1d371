"""One of the processes of `mptbook bench fsdp`: it trains its part, and says what it held.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m mptbook.bench.sharded \
        SETTINGS.json FOLDER

A process alone trains a plain `MPT`. Memory is Linux's account of the process, and what glibc
keeps of freed tensors would be in it; so large ones are mapped, and go back when they are freed,
and what is left of small ones is given back before memory is looked at.
"""

import ctypes
import json
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mptbook import world
from mptbook.bench.measure import added_memory, process_bytes
from mptbook.bench.steps import random_batches
from mptbook.fsdp import Sharding, shard
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.loop import train_steps
from mptbook.weights import write_json

CPU, GLIBC = torch.device("cpu"), ctypes.CDLL(None)
LR = 1e-4
SMALL = MPTConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=64, max_seq_len=16)
PATIENCE = 300  # seconds that a process waits for another
LOOK_AT = 2  # the step in which memory is looked at; the first makes the momentum
M_MMAP_THRESHOLD, SMALL_BYTES = -3, 65_536  # of glibc's malloc.h; tensors above are mapped


def measured(config: MPTConfig, rows: int, steps: int) -> dict:
    """Train on random ids, together with the processes beside this one.

    Args:
        config: rows have its `max_seq_len` tokens.
        rows: of a step, over all processes; a multiple of their number.
        steps: that are timed, after three others.

    Returns:
        `weights`, `gradients` and `momentum`: bytes of the tensors that this process has when
        the optimizer begins the second step. `resident_bytes`, `build_bytes`, `peak_bytes`: by
        which the process has grown since before the model, at that moment; and at most, while
        the model was made and until that moment. `losses` of all steps, over all processes.
        `seconds` of the steps timed, in which freed memory is kept, as `mptbook pretrain` does.
    """
    give_back_freed_memory()
    for _ in losses(*made(SMALL), world.size(), LOOK_AT):
        pass  # what libraries load when they are first used is no memory of the model
    GLIBC.malloc_trim(0)
    before, grown = process_bytes("VmRSS"), added_memory()
    model, optimizer = made(config)
    found: dict = {"build_bytes": grown(), "losses": []}

    def look(*_: object) -> None:
        if len(found["losses"]) == LOOK_AT - 1:
            found.update(held(model, optimizer), peak_bytes=grown())
            GLIBC.malloc_trim(0)
            found["resident_bytes"] = process_bytes("VmRSS") - before

    optimizer.register_step_pre_hook(look)
    times = [time.perf_counter()]
    for loss in losses(model, optimizer, rows, LOOK_AT + 1 + steps):
        found["losses"].append(loss)
        times.append(time.perf_counter())
        if len(found["losses"]) == LOOK_AT:
            keep_freed_memory()  # the next step takes what those after it find again
    taken = [end - begin for begin, end in pairwise(times)]
    return found | {"seconds": taken[-steps:]}


def made(config: MPTConfig) -> tuple[MPT, Lion]:
    """A model of which this process holds its part, and its optimizer."""
    torch.manual_seed(0)
    alone = world.size() == 1
    model = MPT(config) if alone else shard(config, Sharding(), CPU, precision="fp32")
    return model, Lion(model.parameters(), lr=LR)


def losses(model: MPT, optimizer: Lion, rows: int, steps: int) -> Iterator[float]:
    """Train in float32 on this process's part of the rows; the loss of all, for each step."""
    config, own = model.config, slice(world.rank(), None, world.size())
    batches = random_batches(config.vocab_size, rows, config.max_seq_len)
    mine = ((x[own], y[own]) for x, y in batches)
    how = {"steps": steps, "precision": "fp32"}
    for log in train_steps(model, mine, optimizer, lambda _: LR, **how):
        yield log.loss


def held(model: MPT, optimizer: Lion) -> dict[str, int]:
    """Bytes of weights, gradients and momentum in this process."""
    weights = list(model.parameters())
    kinds = {
        "weights": weights,
        "gradients": [weight.grad for weight in weights if weight.grad is not None],
        "momentum": [state["momentum"] for state in optimizer.state.values()],
    }
    return {kind: bytes_behind(tensors) for kind, tensors in kinds.items()}


def bytes_behind(tensors: Iterable[Tensor]) -> int:
    """Of the memory that tensors lie in, each piece once; of a DTensor of what is here."""
    here = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in here}
    return sum(pieces.values())


def give_back_freed_memory() -> None:
    """Have glibc map every large block for itself, so that the system gets it back when freed."""
    assert GLIBC.mallopt(M_MMAP_THRESHOLD, SMALL_BYTES), "glibc did not listen"


def main(settings: str, folder: str) -> None:
    """Measure, and write what was found to a file of this process in `folder`."""
    told = json.loads(settings)
    with world.joined(CPU, PATIENCE):
        found = measured(MPTConfig.from_hf(told["config"]), told["rows"], told["steps"])
        write_json(Path(folder) / f"{world.rank()}.json", found)


if __name__ == "__main__":
    main(*sys.argv[1:])
