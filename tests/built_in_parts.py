"""Several processes build one model; `test_fsdp.py` starts this and reads what each of them took.

Usage: torchrun --standalone --nproc-per-node N built_in_parts.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch

from mptbook import fsdp, world
from mptbook.bench.measure import added_memory, process_bytes
from mptbook.bench.sharded import give_back_freed_memory
from mptbook.fsdp import Sharding, shard
from mptbook.model.config import MPTConfig

CPU = torch.device("cpu")
LARGE = MPTConfig(d_model=330, n_heads=6, n_layers=12, vocab_size=4999, max_seq_len=17)
SMALL = LARGE.replace(d_model=6, n_layers=1, vocab_size=11)


def fresh():
    """Bytes that a process adds at the peak, from Linux's account."""
    added = added_memory()
    shard(LARGE, Sharding(), CPU)
    return added()


def read(folder):
    """The same of a model that is read; looked at after each tensor, and without the pages of
    the file itself, of which all processes see one copy."""
    before, seen, place = process_bytes("RssAnon"), [], fsdp.place

    def noted(*tensors):
        place(*tensors)
        seen.append(process_bytes("RssAnon") - before)

    fsdp.place = noted
    shard(LARGE, Sharding(), CPU, weights=folder)
    return max(seen)


def main(folder):
    give_back_freed_memory()
    shard(SMALL, Sharding(), CPU)  # what libraries load when they are first used
    found = {"fresh": fresh(), "read": read(folder / "model")}
    (folder / f"{world.rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with world.joined(CPU, 60):
        main(Path(sys.argv[1]))
