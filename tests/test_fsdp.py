"""Several processes compute what one computes. Each number of them runs once, for all tests."""

import json

import built_in_parts
import pytest
import sharded_model
import torch
from built_in_parts import LARGE
from processes import run, torchrun
from sharded_model import CONFIG, WAYS, fresh, gradients, trained, whole

from mptbook import Tokenizer, generate, load_model, perplexity, save_model
from mptbook.fsdp import Sharding, shard
from mptbook.model.mpt import MPT
from mptbook.plan import parameters
from mptbook.tokenizer.bpe import train_bpe

EXACT = [name for name in WAYS if name != "bfloat16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(1)
    tokenizer = train_bpe(["the hare ran over the hill"] * 9, 285)
    save_model(MPT(CONFIG), folder / "model", tokenizer)
    return folder


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def several(request, folder):
    """What so many processes found, by way."""
    code, said = run(torchrun(request.param, sharded_model.__file__, folder))
    assert code == 0, said
    return torch.load(folder / f"{request.param}.pt") | {"processes": request.param}


@pytest.fixture(scope="module")
def alone():
    """What one process finds."""
    found = {}
    for name in WAYS:
        model = fresh(name, sharded=False)
        found[name] = {
            "begun": whole(model),
            "gradients": gradients(model, name),
            "logs": trained(model, name),
            "ended": whole(model),
        }
    return found


@pytest.mark.parametrize("name", WAYS)
def test_every_number_of_processes_begins_with_the_same_weights(several, alone, name):
    for key, weight in alone[name]["begun"].items():
        assert torch.equal(several[name]["begun"][key], weight), key


@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_those_of_one_process(several, alone, name):
    for key, expected in alone[name]["gradients"].items():
        error = (several[name]["gradients"][key] - expected).norm()
        assert error < 1e-5 * expected.norm() + 1e-7, key


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_norms_of_accumulated_packed_rows_are_those_of_one_process(several, alone, name):
    for (loss, norm, targets), expected in zip(
        several[name]["logs"], alone[name]["logs"], strict=True
    ):
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert norm == pytest.approx(expected[1], rel=1e-5)
        assert targets == expected[2]


@pytest.mark.parametrize("name", EXACT)
def test_weights_after_three_steps_are_those_of_one_process(several, alone, name):
    for key, expected in alone[name]["ended"].items():
        # A sign flips where a momentum is nought but for rounding, and moves a weight by 0.02.
        off = ((several[name]["ended"][key] - expected).abs() > 1e-5).float().mean()
        assert off < 1e-3, key


def test_pure_precision_is_near_and_leaves_slopes_alone(several, alone):
    assert several["bfloat16"]["slopes"].dtype == torch.float32
    losses = [[log[0] for log in found["bfloat16"]["logs"]] for found in (several, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_every_process_holds_its_part(several):
    n = several["processes"]
    for key, part in several["plain"]["parts"].items():
        rows = several["plain"]["begun"][key]
        assert part == -(-len(rows) // n) * rows[0].numel(), key
        pairs = several["replicas"]["parts"][key]
        assert pairs == -(-len(rows) // (n // 2)) * rows[0].numel(), key


def test_a_saved_model_predicts_and_writes_the_same(several, folder):
    model = load_model(folder / "model")
    tokenizer = Tokenizer.load(folder / "model")
    for key, weight in model.state_dict().items():
        assert torch.equal(several["loaded"]["ended"][key], weight), key
    expected = perplexity(model, tokenizer, ["the hare ran over the hill " * 9], row_tokens=7)
    assert several["loaded"]["nats"] == pytest.approx(expected.nats, rel=1e-4)
    assert several["loaded"]["text"] == generate(model, tokenizer, "the hare", max_new_tokens=5)


def test_a_sharded_model_is_never_whole_in_one_process(tmp_path):
    save_model(MPT(LARGE), tmp_path / "model")
    code, said = run(torchrun(4, built_in_parts.__file__, tmp_path))
    assert code == 0, said
    whole, largest_tensor = 4 * parameters(LARGE)["total"], 4 * LARGE.vocab_size * LARGE.d_model
    assert whole > 60e6
    for rank in range(4):
        for way, added in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert whole / 4 < added < whole / 4 + largest_tensor + 5e6 < whole / 2, (rank, way)


def test_half_precision_of_what_computes_in_float32_is_refused():
    with pytest.raises(ValueError, match=r"fsdp.precision=pure gathers weights in bfloat16, but"):
        shard(CONFIG, Sharding(precision="pure"), torch.device("cpu"), precision="fp32")
