import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from mptbook.bench import positions
from mptbook.bench.positions import POSITIONS, loss_by_length, model_with, rotate, sinusoids
from mptbook.model.config import MPTConfig

CONFIG = MPTConfig(d_model=60, n_heads=6, n_layers=2, vocab_size=97, max_seq_len=16)


def change_of_last_logits_when_shuffled(name):
    torch.manual_seed(0)
    model = model_with(name, CONFIG.replace(n_layers=1)).eval()
    ids = torch.arange(12)[None]
    shuffled = torch.cat([ids[:, :11].flip(1), ids[:, 11:]], dim=1)
    with torch.no_grad():
        return (model(ids) - model(shuffled))[0, -1].abs().max()


@pytest.mark.parametrize("name", POSITIONS)
def test_each_kind_of_positions_tells_one_layer_the_order(name):
    assert change_of_last_logits_when_shuffled(name) > 1e-3


def test_rotation_is_that_of_gpt_neox():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 6, 17, 10)
    angle = positions.angles(17, 10)
    angle = torch.cat([angle, angle], dim=1)[None]
    expected = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close((rotate(q), rotate(k)), expected)


def test_a_rotated_score_depends_on_the_distance_only():
    torch.manual_seed(0)
    q, k = (torch.randn(10).expand(1, 1, 40, 10) for _ in range(2))
    scores = (rotate(q) @ rotate(k).mT)[0, 0]
    for distance in (-7, 0, 3):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert scores.diagonal(3)[0] != scores.diagonal(-7)[0]


def test_sinusoids_are_those_of_the_formula_and_as_large_as_normal_numbers():
    table = sinusoids(50, 12) / 2**0.5
    position, i = 37, 4
    angle = torch.tensor(position / 10_000 ** (2 * i / 12))
    torch.testing.assert_close(table[position, [i, 6 + i]], torch.stack([angle.sin(), angle.cos()]))
    assert sinusoids(4096, 256).square().mean() == pytest.approx(1, rel=1e-3)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="positions are 'ropes'; they must be one of learned"):
        model_with("ropes", CONFIG)


def test_loss_by_length_is_the_mean_over_segments_read_alone():
    torch.manual_seed(0)
    model, ids = model_with("alibi", CONFIG), torch.randint(97, (65,))
    found = loss_by_length(model, ids, (8, 32))
    model.eval()
    for length, loss in found.items():
        nats = 0.0
        for start in range(0, 64, length):
            x, y = ids[start : start + length], ids[start + 1 : start + length + 1]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                rows = model(x[None])[0].float().log_softmax(1)
            nats -= float(rows[range(length), y].sum())
        assert loss == pytest.approx(nats / 64, rel=1e-5)
    assert found[8] != found[32]


def test_a_table_of_positions_has_no_loss_beyond_its_end():
    model, ids = model_with("learned", CONFIG), torch.randint(97, (65,))
    found = loss_by_length(model, ids, (16, 32))
    assert found[16] > 0
    assert found[32] is None


def test_the_comparison_reports_every_kind_at_every_length(monkeypatch, tmp_path):
    rows = type("Rows", (), {"row_tokens": 16, "folder": tmp_path})()
    monkeypatch.setattr(positions, "Rows", lambda data: rows)
    monkeypatch.setattr(positions.Tokenizer, "load", lambda folder: None)
    monkeypatch.setattr(positions, "LENGTHS", (16, 32))
    monkeypatch.setattr(positions, "heldout_ids", lambda tokenizer, n: torch.arange(65) % 97)

    def train(name, rows, steps, seed=0):
        torch.manual_seed(seed)
        return model_with(name, CONFIG)

    monkeypatch.setattr(positions, "train_with", train)
    monkeypatch.setattr(
        positions, "loss_by_length", lambda model, ids: loss_by_length(model, ids, (16, 32))
    )
    monkeypatch.setattr(positions, "keep_freed_memory", lambda: True)  # of this process
    found = positions.compare(tmp_path, steps=1, seeds=2)
    assert tuple(found["loss"]) == tuple(found["seconds"]) == POSITIONS
    assert found["loss"]["learned"]["32"] is None
    assert set(found["spread"]["learned"]) == {"16"}
    one, other = (
        loss_by_length(train("alibi", rows, 1, s), torch.arange(65) % 97, (16,)) for s in (0, 1)
    )
    assert found["loss"]["alibi"]["16"] == pytest.approx((one[16] + other[16]) / 2)
    assert found["spread"]["alibi"]["16"] == pytest.approx(abs(one[16] - other[16]))
