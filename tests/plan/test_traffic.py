"""Bytes that GPUs send: by hand, and against the collectives that PyTorch really calls."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.plan.costs import parameters
from mptbook.plan.memory import POLICIES, Setup
from mptbook.plan.traffic import traffic

ODD = MPTConfig(d_model=6, n_heads=2, n_layers=3, vocab_size=11, expansion_ratio=2)
SEVEN = MPTConfig.named("mpt-7b")
# Every dimension is a multiple of the GPUs below: PyTorch pads what is not.
SMALL = MPTConfig(d_model=24, n_heads=3, n_layers=5, vocab_size=136).replace(attn_impl="sdpa")


class Collectives(TorchDispatchMode):
    """Bytes that go into and come out of each kind of collective."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = str(function)
        if kind.startswith("c10d."):
            first, second = (args[0], args[1]) if "base" in kind else (args[0][0], args[0][0])
            out, into = self.bytes.get(kind, (0, 0))
            self.bytes[kind] = out + first.nbytes, into + second.nbytes
        return function(*args, **(kwargs or {}))


@pytest.fixture
def eight_processes():
    """This one and seven that are made up: collectives return at once, and nothing arrives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


def sent(precision, shards, recompute):
    """Bytes that one of eight processes sends in a forward and backward pass, by kind."""
    policy = POLICIES[precision]
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    mixed = MixedPrecisionPolicy(
        param_dtype=dtypes[policy.gathered], reduce_dtype=dtypes[policy.reduced]
    )
    shape = (8 // shards, shards) if shards < 8 else (8,)
    names = ("copies", "shards")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    how = {"mesh": mesh, "mp_policy": mixed}
    model = MPT(SMALL)
    model.recompute = recompute
    for block in model.transformer.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "loss")
    ids = torch.zeros(1, 3, dtype=torch.long)
    with Collectives() as seen:
        model.loss(ids, ids).backward()
    whole, own = seen.bytes.pop("c10d._allgather_base_.default")
    owned, gradients = seen.bytes.pop("c10d._reduce_scatter_base_.default")
    found = {"gathers": whole - own, "reduce-scatter": gradients - owned, "all-reduce": 0}
    if shards < 8:
        (averaged, _) = seen.bytes.pop("c10d.allreduce_.default")
        copies = 8 // shards
        found["all-reduce"] = 2 * (copies - 1) * averaged // copies
    assert not seen.bytes  # no other collective
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shards", [8, 4])
@pytest.mark.parametrize("precision", POLICIES)
def test_pytorch_sends_what_is_planned_to_the_byte(eight_processes, precision, shards, recompute):
    planned = traffic(SMALL, Setup(8, 3, precision=precision, shards=shards))
    found = sent(precision, shards, recompute)
    assert found["gathers"] == planned["gather forwards"] + planned["gather backwards"]
    assert found["reduce-scatter"] == planned["reduce-scatter"]
    assert found["all-reduce"] == planned["all-reduce"]


def test_traffic_by_hand():
    total, root = 3 * 300 + 72, 72
    found = traffic(ODD, Setup(4, 8, precision="default"))
    assert found["gather forwards"] == 2 * total * 3 / 4
    assert found["gather backwards"] == 2 * (total - root) * 3 / 4
    assert found["reduce-scatter"] == 4 * total * 3 / 4
    assert found["all-reduce"] == 0
    assert found["total"] == sum(found.values()) / 2


def test_copies_of_the_weights_send_less_and_average_what_they_own():
    whole, grouped = traffic(SEVEN, Setup(64, 2048)), traffic(SEVEN, Setup(64, 2048, shards=8))
    assert grouped["total"] < whole["total"]
    # in a ring each of 8 copies sends 7 parts of 8 of an eighth of the gradients, twice
    share = parameters(SEVEN)["total"] / 8
    assert grouped["all-reduce"] == pytest.approx(2 * 7 / 8 * 2 * share)


def test_one_gpu_sends_nothing():
    assert traffic(SEVEN, Setup(1, 2048))["total"] == 0
