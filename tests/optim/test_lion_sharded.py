"""Lion under FSDP2: two processes on a CPU do what one does, and read its checkpoints."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharded.py")
spec = importlib.util.spec_from_file_location("sharded", SCRIPT)
sharded = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sharded)

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
kinds = pytest.mark.parametrize("kind", sharded.KINDS)


@pytest.fixture(scope="module")
def one():
    """For each kind the model and optimizer of one process after three steps."""
    made = {kind: sharded.make(kind) for kind in sharded.KINDS}
    for model, optimizer in made.values():
        sharded.train(model, optimizer, range(3))
    return made


@pytest.fixture(scope="module")
def ranks(one, tmp_path_factory):
    """What each of two processes found; `folder` has what they saved."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind, (model, optimizer) in one.items():
        sharded.save(folder / f"one-{kind}", model, optimizer)
    for model, optimizer in one.values():
        sharded.train(model, optimizer, range(3, 6))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, SCRIPT, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)] + [folder]


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@kinds
def test_two_processes_equal_one_bit_for_bit(one, ranks, kind):
    assert_same(ranks[0][kind], sharded.whole(*one[kind]))


@kinds
def test_each_process_keeps_state_for_its_part_only(ranks, kind):
    shapes = [set(rank[f"{kind} shard"].values()) for rank in ranks[:2]]
    assert shapes == [{(4, 3)}, {(3, 3)}]  # of a matrix (7, 3)
    assert ("master" in ranks[0][f"{kind} shard"]) == (kind == "master")


@kinds
def test_two_processes_go_on_from_the_checkpoint_of_one(one, ranks, kind):
    assert_same(ranks[0][f"{kind} loaded"], sharded.whole(*one[kind]))


@kinds
def test_one_process_goes_on_from_the_checkpoint_of_two(one, ranks, kind):
    model, optimizer = sharded.make(kind, seed=1)
    sharded.load(ranks[2] / f"two-{kind}", model, optimizer)
    assert optimizer.param_groups[0]["initial_lr"] == 0.02
    sharded.train(model, optimizer, range(3, 6))
    assert_same(sharded.whole(model, optimizer), sharded.whole(*one[kind]))


def test_a_gradient_that_comes_in_parts_is_summed_before_its_sign_is_taken(ranks):
    for rank in ranks[:2]:
        weight, momentum = rank["parts"]
        assert weight.tolist() == [-0.5, 0.5]
        torch.testing.assert_close(momentum, torch.tensor([0.02, -0.02]))
