"""Several processes build and train sharded models; `test_fsdp.py` starts this and compares.

Usage: torchrun --standalone --nproc-per-node N sharded_model.py FOLDER
"""

import sys
from pathlib import Path

import torch

from mptbook import world
from mptbook.data.packing import document_ids, without_first_tokens
from mptbook.eval.perplexity import perplexity
from mptbook.fsdp import Sharding, load_sharded, shard
from mptbook.infer.generate import generate
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.loop import train_steps

CPU = torch.device("cpu")
CONFIG = MPTConfig(d_model=30, n_heads=6, n_layers=3, vocab_size=331, max_seq_len=17).replace(
    attn_uses_sequence_id=True
)
UNTIED = CONFIG.replace(tie_word_embeddings=False, no_bias=False, alibi=False, qk_ln=True)
WAYS = {  # configuration, how it is sharded, every how many blocks are recomputed
    "plain": (CONFIG, {}, 0),
    "recomputed": (CONFIG, {}, 2),
    "replicas": (CONFIG, {"replicas": 2}, 1),
    "everything": (UNTIED, {}, 0),
    "bfloat16": (CONFIG, {"precision": "pure"}, 0),
    "offloaded": (CONFIG, {"offload": True}, 0),
}
SETTINGS = {"steps": 3, "accumulate": 2, "clip": 0.7}


def precision_of(name):
    return "bf16" if name == "bfloat16" else "fp32"


def all_rows():
    """(12, 17) inputs and targets of packed rows: some have 15 targets, some 3."""
    ids = torch.randint(1, 331, (12, 18), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = ids[:, 11] = 0  # where a document ends
    x, y = ids[:, :-1], without_first_tokens(ids[:, :-1], ids[:, 1:].clone(), 0)
    y[::3, 4:] = -100
    y[1, :] = -100  # a process may be left without a target
    return x, y, document_ids(x, 0)


def batches(rank=0, world_size=1):
    """Six batches of four rows, or of each the rows of one process."""
    x, y, documents = all_rows()
    for at in range(0, 24, 4):
        rows = [n % 12 for n in range(at, at + 4)][rank::world_size]
        yield x[rows], y[rows], documents[rows]


def trained(model, name, **which):
    """The losses and norms of three steps of the model, packed rows apart."""
    # The bias of keys has no gradient but rounding, which a sign or a mean would blow up.
    kind = torch.optim.SGD if name == "everything" else Lion
    optimizer = kind(model.parameters(), lr=0.01)
    logs = train_steps(
        model, batches(**which), optimizer, lambda _: 0.01, precision=precision_of(name), **SETTINGS
    )
    return [(log.loss, log.grad_norm, log.targets) for log in logs]


def fresh(name, sharded):
    config, how, recompute = WAYS[name]
    torch.manual_seed(5)
    if sharded:
        precision = precision_of(name)
        return shard(config, Sharding(**how), CPU, recompute=recompute, precision=precision)
    model = MPT(config)
    model.recompute = recompute
    return model


def gradients(model, name, rank=0, world_size=1):
    """Whole gradients of one batch, divided by its targets."""
    x, y, documents = all_rows()
    mine = slice(rank, None, world_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision_of(name) == "bf16"):
        loss = model.loss(x[mine], y[mine], documents[mine])
    (loss / (y != -100).sum()).backward()
    found = {}
    for weight_name, weight in model.named_parameters():
        grad = weight.grad
        found[weight_name] = grad.full_tensor() if is_sharded(grad) else grad
    model.zero_grad()
    return found


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def whole(model):
    return {
        name: (weight.full_tensor() if is_sharded(weight) else weight).clone()
        for name, weight in model.state_dict().items()
    }


def main(folder):
    found = {}
    rank, size = world.rank(), world.size()
    for name in WAYS:
        model = fresh(name, sharded=True)
        begun = whole(model)
        parts = {key: weight.to_local().numel() for key, weight in model.state_dict().items()}
        found[name] = {
            "begun": begun,
            "parts": parts,
            "slopes": model.slopes,
            "gradients": gradients(model, name, rank, size),
            "logs": trained(model, name, rank=rank, world_size=size),
            "ended": whole(model),
        }
    tokenizer = Tokenizer.load(folder / "model")
    model = load_sharded(folder / "model", Sharding(), CPU)
    prediction = perplexity(model, tokenizer, ["the hare ran over the hill " * 9], row_tokens=7)
    found["loaded"] = {
        "nats": prediction.nats,
        "text": generate(model, tokenizer, "the hare", max_new_tokens=5),
        "ended": whole(model),
    }
    if rank == 0:
        torch.save(found, folder / f"{size}.pt")


if __name__ == "__main__":
    with world.joined(CPU, 60):
        main(Path(sys.argv[1]))
