import pytest
import torch

from mptbook.bench import optimizers
from mptbook.bench.optimizers import ADAMW, COMPILED, compare, random_weights, state_bytes
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

CONFIG = MPTConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=11, max_seq_len=16)


def test_the_weights_have_the_shapes_of_the_model_and_gradients():
    weights = random_weights(CONFIG, torch.bfloat16, "cpu")
    assert [w.shape for w in weights] == [w.shape for w in MPT(CONFIG).parameters()]
    assert {w.grad.dtype for w in weights} == {torch.bfloat16}


def test_every_optimizer_is_timed_and_lion_keeps_half_of_what_adamw_keeps(monkeypatch):
    monkeypatch.setattr(optimizers.MPTConfig, "named", lambda name: CONFIG)
    monkeypatch.setattr(optimizers, "compiler_found", lambda device: False)
    found = compare("any", repeats=1)
    n, n_tensors = found["parameters"], len(list(MPT(CONFIG).parameters()))
    assert found["seconds"].keys() == found["state_bytes"].keys()
    assert COMPILED not in found["seconds"]
    assert found["compile_seconds"] is None
    state = found["state_bytes"]
    assert state[ADAMW] == 8 * n + 4 * n_tensors  # and a number of steps for each tensor
    assert state["lion-pytorch"] == state["Lion"] == 4 * n
    names = [f"Lion, bfloat16, {rounding}" for rounding in ("nearest", "stochastic", "master")]
    assert [state[name] for name in names] == [2 * n, 2 * n, 8 * n]


def test_state_that_was_never_made_takes_no_bytes():
    assert state_bytes(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])) == 0


def test_a_peer_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'mptbook\[bench\]'"):
        optimizers.optimizers([], [])
