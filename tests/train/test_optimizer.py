"""The optimizer that a run's settings name."""

import pytest
import torch

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion
from mptbook.train.optimizer import Optim, make_optimizer

MODEL = MPT(MPTConfig(d_model=12, n_heads=2, n_layers=1, vocab_size=11, max_seq_len=6))


@pytest.mark.parametrize("decoupled", [False, True])
def test_lion_decays_as_the_settings_say(decoupled):
    optim = Optim(lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), decoupled=decoupled)
    optimizer = make_optimizer(MODEL, optim)
    assert isinstance(optimizer, Lion)
    matrices, embeddings, vectors = optimizer.param_groups
    decays = [group["weight_decay"] for group in (matrices, embeddings, vectors)]
    assert decays == [0.1, 0.1, 0.0]
    assert matrices["betas"] == (0.8, 0.9)
    weight = MODEL.transformer.blocks[0].attn.Wqkv.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.25  # half the peak
    optimizer.step()
    torch.testing.assert_close(weight.data, before * (1 - (0.5 if decoupled else 0.25) * 0.1))
    weight.data.copy_(before)


@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_embeddings_and_vectors_may_have_rates_of_their_own(name):
    optim = Optim(name=name, lr=0.5, weight_decay=0.1, embedding_lr=3.0, vector_lr=8.0)
    matrices, embeddings, vectors = make_optimizer(MODEL, optim).param_groups
    (table,) = embeddings["params"]
    assert table is MODEL.transformer.wte.weight
    assert (embeddings["lr"], embeddings["lr_factor"], embeddings["weight_decay"]) == (1.5, 3, 0.1)
    assert (vectors["lr"], vectors["lr_factor"], vectors["weight_decay"]) == (4.0, 8, 0)
    assert (matrices["lr"], matrices.get("lr_factor")) == (0.5, None)
    assert [w.dim() for w in vectors["params"]] == [1, 1, 1]
    names = [w for group in (matrices, embeddings, vectors) for w in group["params"]]
    assert {id(w) for w in names} == {id(w) for w in MODEL.parameters()}


def test_adamw_has_no_decay_apart_from_its_rate():
    assert isinstance(make_optimizer(MODEL, Optim(name="adamw")), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"optim\.decoupled is a setting of Lion"):
        make_optimizer(MODEL, Optim(name="adamw", decoupled=True))
