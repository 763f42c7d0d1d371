import pytest
import torch

from mptbook.bench import precision
from mptbook.bench.precision import KINDS, NUDGED, model_with, thinned
from mptbook.model.config import MPTConfig

CONFIG = MPTConfig(d_model=60, n_heads=6, n_layers=2, vocab_size=97, max_seq_len=16)


def test_both_norms_begin_with_the_same_weights():
    full, low = (
        model_with(kind, CONFIG, seed=3).state_dict()
        for kind in ("layernorm", "low_precision_layernorm")
    )
    assert all(torch.equal(full[name], low[name]) for name in full)
    other = model_with("layernorm", CONFIG, seed=4).state_dict()
    assert not torch.equal(full["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_nudge_is_one_step_of_float32_in_the_embedding_and_nothing_else():
    plain, nudged = (model_with(k, CONFIG, seed=3).state_dict() for k in ("layernorm", NUDGED))
    for name, weight in plain.items():
        if name == "transformer.wte.weight":
            assert (nudged[name] > weight).all()
            back = torch.nextafter(nudged[name], torch.tensor(-torch.inf))
            assert torch.equal(back, weight)
        else:
            assert torch.equal(nudged[name], weight)


def test_only_the_low_precision_kind_has_low_precision_norms():
    low = {kind: model_with(kind, CONFIG, 0).transformer.norm_f.low_precision for kind in KINDS}
    assert [kind for kind in KINDS if low[kind]] == ["low_precision_layernorm"]


def test_a_curve_is_the_means_of_so_many_steps():
    assert thinned([1.0, 2.0, 4.0, 6.0, 9.0], 2) == [1.5, 5.0, 9.0]


def test_the_comparison_reports_every_seed_of_every_kind(monkeypatch, tmp_path):
    rows = type("Rows", (), {"row_tokens": 16, "folder": tmp_path})()
    log = type("Log", (), {"loss": 2.0})()
    trained = []

    def train(model, rows, optim, *, steps, seed, name):
        trained.append((name, seed))
        return [log] * steps

    monkeypatch.setattr(precision, "Rows", lambda data: rows)
    monkeypatch.setattr(precision.Tokenizer, "load", lambda folder: None)
    monkeypatch.setattr(precision, "heldout_ids", lambda tokenizer, n: torch.arange(33) % 97)
    monkeypatch.setattr(precision, "tiny_config", lambda rows: CONFIG)
    monkeypatch.setattr(precision, "train", train)
    monkeypatch.setattr(precision, "keep_freed_memory", lambda: True)  # of this process
    found = precision.compare(tmp_path, steps=3, seeds=2)
    assert trained == [(kind, seed) for kind in KINDS for seed in (0, 1)]
    for kind in KINDS:
        first, second = found["loss"][kind]
        assert first != second
        assert found["spread"][kind] == pytest.approx(abs(first - second))
        assert found["curve"][kind] == [[2.0], [2.0]]
    assert found["loss"]["layernorm"] != found["loss"]["low_precision_layernorm"]
