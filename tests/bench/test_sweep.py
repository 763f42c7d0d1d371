import math
from typing import ClassVar

import pytest
import torch

from mptbook.bench import sweep
from mptbook.bench.sweep import GRIDS, compare, optimizer_for, settings
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.optim.lion import Lion

CONFIG = MPTConfig(d_model=24, n_heads=3, n_layers=1, vocab_size=11, max_seq_len=16)
KINDS = {"lion": Lion, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class Pattern:
    """Rows that repeat: what a small model learns in a few steps."""

    row_tokens = 16
    folder = None

    domains: ClassVar = {"all": range(40)}

    def __getitem__(self, rows):
        return (rows[:, None] + torch.arange(17).numpy()) % 7


@pytest.mark.parametrize("name", GRIDS)
def test_each_optimizer_has_the_rate_and_decays_matrices_only(name):
    optimizer = optimizer_for(name, MPT(CONFIG), 0.5, 0.25)
    assert type(optimizer) is KINDS[name]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5] * 3
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer is 'adam'; it must be one of lion, adamw, sgd"):
        optimizer_for("adam", MPT(CONFIG), 0.5, 0.0)


def test_settings_are_every_rate_with_every_decay_once():
    found = list(settings())
    assert len(found) == len(set(found)) == sum(len(lr) * len(wd) for lr, wd in GRIDS.values())
    assert ("lion", 1e-3, 3.0) in found


def test_the_comparison_reports_a_loss_for_each_setting_and_seed(monkeypatch):
    monkeypatch.setattr(sweep, "Rows", lambda data: Pattern())
    monkeypatch.setattr(sweep.Tokenizer, "load", lambda folder: None)
    monkeypatch.setattr(sweep, "heldout_ids", lambda tokenizer, n: torch.arange(65) % 7)
    monkeypatch.setattr(sweep, "keep_freed_memory", lambda: True)  # of this process
    monkeypatch.setattr(sweep, "SHAPE", {"d_model": 24, "n_layers": 1})
    monkeypatch.setattr(sweep, "VOCABULARY", 11)
    monkeypatch.setattr(sweep, "BATCH_TOKENS", 64)
    grids = {"lion": ((1e-2,), (0.0, 1.0)), "sgd": ((0.1, 1e30), (0.0,))}
    monkeypatch.setattr(sweep, "GRIDS", grids)
    found = compare("any", steps=8, seeds=2)
    assert [(r["optimizer"], r["lr"], r["weight_decay"]) for r in found["runs"]] == [
        ("lion", 1e-2, 0.0),
        ("lion", 1e-2, 1.0),
        ("sgd", 0.1, 0.0),
        ("sgd", 1e30, 0.0),
    ]
    first, decayed, _, wild = (run["losses"] for run in found["runs"])
    assert len({*first, *decayed}) == 4
    assert all(loss < math.log(11) for loss in first)
    assert wild == [None, None]  # JSON has no NaN
