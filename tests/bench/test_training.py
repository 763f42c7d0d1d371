import importlib
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mptbook.__main__ import main
from mptbook.bench.training import heldout_ids, tiny_config, tiny_run, train
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer


class Pattern:
    """Rows that repeat: what a small model learns in a few steps."""

    row_tokens = 16

    domains: ClassVar = {"all": range(40)}

    def __getitem__(self, rows):
        return (rows[:, None] + torch.arange(17).numpy()) % 7


def small_model():
    torch.manual_seed(0)
    return MPT(MPTConfig(d_model=24, n_heads=3, n_layers=1, vocab_size=11, max_seq_len=16))


def test_a_small_training_learns_and_is_repeated_by_its_seed(capsys):
    losses = []
    for seed in (0, 0, 1):
        logs = train(small_model(), Pattern(), tiny_run().optim, steps=20, seed=seed, name="lion")
        losses.append([log.loss for log in logs])
    assert len(losses[0]) == 20
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == losses[1] != losses[2]
    assert capsys.readouterr().out.count("lion        step    20") == 3


def test_the_shape_is_that_of_the_recipe_for_rows_of_this_length():
    config = tiny_config(Pattern())
    assert config.max_seq_len == Pattern.row_tokens
    recipe = tiny_run()
    assert config.init_config.init_div_is_residual == recipe.shape["init_div_is_residual"]
    assert config == MPTConfig.named("mpt-tiny").replace(max_seq_len=16, **recipe.shape)
    recipe.shape = {}
    assert tiny_config(Pattern(), recipe) == MPTConfig.named("mpt-tiny").replace(max_seq_len=16)


def test_the_warm_up_is_shortened_with_the_run():
    optim = tiny_run().optim
    assert optim.warmup == 100
    logs = train(small_model(), Pattern(), optim, steps=10)
    assert logs[0].lr == optim.lr  # a warm-up of one step
    assert optim.warmup == 100


def test_a_step_takes_as_many_tokens_as_it_is_told():
    counted = {
        tokens: train(small_model(), Pattern(), tiny_run().optim, steps=1, batch_tokens=tokens)
        for tokens in (None, 64)
    }
    found = {tokens: logs[0].targets for tokens, logs in counted.items()}
    assert found == {None: tiny_run().batch_tokens, 64: 64}


def test_held_out_ids_are_the_novels_end_to_end():
    tokenizer = Tokenizer.gpt_neox()
    ids = heldout_ids(tokenizer, 300)
    assert ids.shape == (301,)
    assert torch.equal(ids[:101], heldout_ids(tokenizer, 100))
    with pytest.raises(ValueError, match="ask for fewer than 10000000"):
        heldout_ids(tokenizer, 10_000_000)


@pytest.mark.parametrize("name", ["positions", "precision", "curriculum"])
def test_a_bench_that_trains_writes_what_it_found_and_where(name, tmp_path, monkeypatch):
    module = importlib.import_module(f"mptbook.bench.{name}")
    told = {}

    def compare(data, **how):
        told.update(how, data=data)
        return {"loss": 1.5}

    monkeypatch.setattr(module, "compare", compare)
    out = tmp_path / "figures.json"
    words = ["bench", name, "--data", "rows", "--steps", "7", "--seeds", "3", "--out", str(out)]
    assert main(words) == 0
    assert told == {"data": Path("rows"), "steps": 7, "seeds": 3}
    found = json.loads(out.read_text())
    assert found["loss"] == 1.5
    assert found["machine"]["cpu"]
