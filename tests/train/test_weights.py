"""Runs that go on from the weights of a model directory."""

import json

import pytest
import torch

from mptbook import load_model
from mptbook.data.curriculum import Stage
from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.log import read_log
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain, pretrain
from mptbook.train.run import Run


@pytest.fixture(scope="module")
def learned(data, shape, tmp_path_factory):
    """A run of 30 steps over rows of 16 tokens."""
    out = tmp_path_factory.mktemp("learned") / "run"
    optim = Optim(lr=3e-3, warmup=2)
    pretrain(Pretrain(data=data, out=out, shape=shape, steps=30, batch_tokens=64, optim=optim))
    return out


def later(data, out, start, **changes):
    values = {
        "data": data,
        "out": out,
        "weights": str(start),
        "steps": 4,
        "batch_tokens": 96,
        "micro_batch_tokens": 48,
        "recompute": True,
        "shape": {"alibi_bias_max": 16, "clip_qkv": 6, "resid_pdrop": 0.0},
        "stages": [Stage(tokens=4 * 96, row_tokens=48)],
        "optim": Optim(lr=1e-4, warmup=1),
    }
    return Pretrain(**(values | changes))


def test_a_run_goes_on_with_longer_rows_flatter_slopes_and_clipped_projections(
    data, learned, tmp_path
):
    """StoryWriter's recipe in small."""
    pretrain(later(data, tmp_path / "long", learned))
    model = load_model(tmp_path / "long")
    assert model.config.max_seq_len == 48
    assert model.config.attn_config.alibi_bias_max == 16
    assert model.config.attn_config.clip_qkv == 6
    first = read_log(tmp_path / "long", "step")[0]["loss"]
    assert first < 0.8 * read_log(learned, "step")[0]["loss"]


def test_the_first_step_sees_the_given_weights(data, learned, tmp_path):
    run = Run.make(later(data, tmp_path, learned))
    given = load_model(learned).state_dict()
    assert all(torch.equal(w, given[name]) for name, w in run.model.state_dict().items())
    assert all(w.requires_grad for w in run.model.parameters())


def test_rows_of_another_tokenizer_are_refused(data, learned, tmp_path):
    other = tmp_path / "rows"
    other.mkdir()
    for file in data.iterdir():
        (other / file.name).symlink_to(file)
    for name in ("tokenizer.json", "data.json"):
        (other / name).unlink()
    tokenizer = train_bpe(["quite other words"] * 9, 290)
    tokenizer.save(other / "tokenizer.json")
    about = json.loads((data / "data.json").read_text()) | {"tokenizer": tokenizer.sha256}
    (other / "data.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"has another tokenizer than .* prepare them"):
        pretrain(later(other, tmp_path / "run", learned))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": {"n_layers": 3}}, "blocks.2"),
        ({"shape": {"n_head": 3}}, "n_head is not a field of an MPT configuration"),
        ({"weights": "nowhere"}, "nowhere does not exist; give a model directory"),
    ],
)
def test_weights_that_do_not_fit_are_refused(data, learned, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(later(data, tmp_path / "run", learned, **changes))
    assert not (tmp_path / "run").exists()


def test_the_settings_file_keeps_where_the_weights_came_from(data, learned, tmp_path):
    pretrain(later(data, tmp_path / "run", learned))
    text = (tmp_path / "run" / "run.toml").read_text()
    assert f"weights = {json.dumps(str(learned))}" in text
    pretrain(Pretrain.from_toml(tmp_path / "run" / "run.toml", out=tmp_path / "again"))
    one, other = (load_model(tmp_path / name).state_dict() for name in ("run", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
