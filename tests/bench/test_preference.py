import itertools
import json

import pytest
import torch

from mptbook.bench import preference
from mptbook.bench.preference import (
    BETAS,
    ask,
    compare,
    gained,
    likelihood_steps,
    mean_and_error,
    measure,
    start_from,
    written,
)
from mptbook.directory import load_model, save_model
from mptbook.finetune.dpo import answer_log_probs
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe
from mptbook.tokenizer.chat import ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A tiny chat model, and a set of few pairs."""
    whole = preference.default_pairs

    def few(split, **how):
        short = (p for p in whole(split, **how) if len(p.chosen + p.rejected) < 160)
        return list(itertools.islice(short, 7))

    monkeypatch.setattr(preference, "default_pairs", few)
    monkeypatch.setattr("mptbook.finetune.preference.default_pairs", few)
    monkeypatch.setattr(preference, "SAMPLES", 1)
    monkeypatch.setattr(preference, "MOST_TOKENS", 5)
    torch.manual_seed(2)
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, max_seq_len=320, vocab_size=300)
    save_model(MPT(config), tmp_path / "base", train_bpe(["hello <|im_end|> what if?"] * 9, 300))
    start_from(str(tmp_path / "base"), tmp_path / "start", steps=2, batch=2, lr=1e-3)
    return tmp_path / "start"


@pytest.fixture
def asked(start):
    return ask(load_model(start), Tokenizer.load(start), ChatTemplate.load(start))


def test_all_ways_begin_as_the_same_model_and_are_measured_alike(start):
    found = json.loads(json.dumps(compare(start, steps=2, seeds=1, batch_pairs=4, lr=1e-2)))
    ways = [(run["way"], run["beta"]) for run in found["runs"]]
    assert ways == [("preferences", beta) for beta in BETAS] + [
        ("any length", 0.1),
        ("chosen only", None),
    ]
    assert found["start"]["margin"] == 0
    assert found["start"]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert all(run["margin"] != 0 and run.keys() > found["start"].keys() for run in found["runs"])
    assert found["pairs"]["train, matched"]["pairs"] == 7


def test_likelihood_steps_raise_it(asked):
    examples = [(pair.prompt, pair.chosen) for pair in asked.heldout[:2]]
    model = asked.reference
    before = answer_log_probs(model, *zip(*examples, strict=True)).sum()
    likelihood_steps(model, examples, lr=1e-2, steps=8, batch=2, seed=0)
    assert answer_log_probs(model, *zip(*examples, strict=True)).sum() > before + 10


def test_the_distance_is_what_the_answers_gained(asked, start):
    model = load_model(start)
    likelihood_steps(
        model, [(p.prompt, p.chosen) for p in asked.heldout], lr=1e-2, steps=3, batch=2, seed=0
    )
    rows = written(model, asked)
    each = gained(model.eval(), asked, rows)
    one, was = (
        float(answer_log_probs(each_model, asked.prompts[20:21], rows[20:21]).detach())
        for each_model in (model, asked.reference)
    )
    assert each[20] == pytest.approx(one - was, abs=1e-4)
    assert measure(model, asked)["kl"][0] == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_a_mean_has_its_standard_error():
    mean, error = mean_and_error([1.0, 3.0, 5.0, 7.0])
    assert mean == 4
    assert error == pytest.approx((20 / 3) ** 0.5 / 2)
