"""Whole runs, most of them through the command line in a process of their own."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.log import read_history, read_log
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain, pretrain


@pytest.fixture
def settings(data, shape):
    """`settings(out, name=value, ...)`"""

    def make(out, **changes):
        values = {
            "data": data,
            "out": out,
            "shape": shape,
            "steps": 12,
            "batch_tokens": 64,
            "heldout_every": 5,
            "save_every": 4,
            "optim": Optim(lr=1e-3, warmup=2),
        }
        return Pretrain(**(values | changes))

    return make


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_run_leaves_a_log_checkpoints_and_a_model_directory(settings, tmp_path):
    from mptbook import Tokenizer, generate, load_model

    out = tmp_path / "run"
    assert pretrain(settings(out)) == out / "model"
    steps = read_log(out, "step")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in read_log(out, "heldout")] == [5, 10, 12]
    (final,) = read_log(out, "final")
    assert final["bits_per_byte"] == pytest.approx(final["domains"]["hares"])
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "log.jsonl",
        "model",
        "run.toml",
        "step-000008",
        "step-000012",
    ]
    assert_identical(weights(out / "model"), weights(out / "step-000012"))
    model, tokenizer = load_model(out), Tokenizer.load(out / "model")
    assert isinstance(generate(model, tokenizer, "the hare", max_new_tokens=5)[0], str)


@pytest.mark.parametrize("at_once", [64, 16])
def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(settings, tmp_path, at_once):
    # dropout is on, so the random state matters too
    pretrain(settings(tmp_path / "whole", micro_batch_tokens=at_once))
    part = tmp_path / "part"
    pretrain(settings(part, micro_batch_tokens=at_once))
    for path in (part / "step-000012", part / "model"):
        path.rename(tmp_path / f"lost-{path.name}")
    pretrain(settings(part, micro_batch_tokens=at_once, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_identical(
            load_file(tmp_path / "whole" / "step-000012" / name),
            load_file(part / "step-000012" / name),
        )
    whole, again = (read_log(tmp_path / name, "step") for name in ("whole", "part"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in again]


def test_a_checkpoint_removes_what_killed_processes_left_half_written(settings, tmp_path):
    pretrain(settings(tmp_path / "run"))
    for name in ("partial-000004", ".partial-000004-x1"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "model.safetensors").write_text("half")
    pretrain(settings(tmp_path / "run", steps=13, resume=True))
    assert not list((tmp_path / "run").glob("*partial*"))
    assert (tmp_path / "run" / "step-000013" / "state.json").exists()


def test_accumulated_micro_batches_train_like_a_whole_batch(settings, shape, tmp_path):
    shape = shape | {"resid_pdrop": 0.0}
    how = {"shape": shape, "precision": "fp32", "steps": 3, "optim": Optim(name="adamw", warmup=1)}
    pretrain(settings(tmp_path / "a", **how))
    pretrain(settings(tmp_path / "b", micro_batch_tokens=16, **how))
    a, b = (read_log(tmp_path / name, "step") for name in "ab")
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


def test_documents_are_kept_apart_where_the_shape_says_so(settings, shape, tmp_path):
    losses = []
    for apart in (False, True):
        apart_shape = shape | {"attn_uses_sequence_id": apart, "resid_pdrop": 0.0}
        out = tmp_path / str(apart)
        pretrain(settings(out, shape=apart_shape, steps=1, optim=Optim(warmup=0)))
        losses.append(read_log(out, "step")[0]["loss"])
    assert losses[0] != losses[1]


def test_activations_are_recomputed_where_the_run_says_so(settings, shape, tmp_path, monkeypatch):
    from mptbook.model import mpt

    calls = []
    original = mpt.checkpoint
    monkeypatch.setattr(mpt, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    for recompute, expected in ((False, 0), (True, shape["n_layers"])):
        out = tmp_path / str(recompute)
        pretrain(settings(out, steps=1, recompute=recompute, optim=Optim(warmup=0)))
        assert len(calls) == expected


def test_the_settings_file_of_a_run_repeats_it(settings, tmp_path):
    pretrain(settings(tmp_path / "first"))
    repeated = Pretrain.from_toml(tmp_path / "first" / "run.toml", out=tmp_path / "second")
    pretrain(repeated)
    assert_identical(weights(tmp_path / "first" / "model"), weights(tmp_path / "second" / "model"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": "-3"}, "steps='-3': input should be greater than 0"),
        ({"optim.lrr": "1"}, "optim.lrr is not a setting; did you mean optim.lr?"),
        ({"optim.lr": "inf"}, "optim.lr='inf': input should be a finite number"),
        ({"optim.lr": "0"}, "optim.lr='0': input should be greater than 0"),
        ({"optim.betas": "[0.9, 1.0]"}, "input should be less than 1"),
        ({"optim.weight_decay": "-1"}, "input should be greater than or equal to 0"),
        ({"guard.window": "1"}, "guard.window='1': input should be greater than or equal to 2"),
        ({"optim.schedule": "step"}, "optim.schedule='step': input should be 'cosine'"),
        ({"optim.warmup": "12"}, "warmup is 12 steps of 12; it must be shorter than the run"),
        ({"batch_tokens": "70"}, "batch_tokens=70 is not a multiple of the 16 tokens of a row"),
        ({"micro_batch_tokens": "48"}, "is not a multiple of micro_batch_tokens=48; take 48"),
        ({"model": "mpt-7c"}, "did you mean mpt-7b?"),
        ({"shape": "n_head=3"}, "n_head is not a field of an MPT configuration; did you mean"),
        ({"shape": "no_bias=False"}, "no_bias is 'False'; it must be bool"),
        ({"shape": "resid_pdrop=nan"}, "resid_pdrop is nan; it must be from 0 on"),
        ({"shape": "attn_config=foo"}, "give the fields of attn_config by their own names"),
        ({"shape": "no_bias"}, "--shape no_bias: it must be NAME=VALUE"),
        ({"mixture": "hares=0"}, "error: no source of ['hares'] has a weight above 0; give one"),
        ({"shape": "vocab_size=299"}, "has 300 ids, the model only 299"),
        ({"device": "meta"}, "device is meta; it must be auto, cpu, cuda or cuda:NUMBER"),
        ({"device": "cuda"}, "device is cuda, but no CUDA device is here; use --device cpu"),
        ({"data": "nowhere"}, "nowhere is not prepared; run: mptbook prepare"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case says that there is no CUDA")
def test_a_mistake_is_one_line_and_exit_code_2(command, tmp_path, wrong, message, capsys):
    from mptbook.__main__ import main

    code = main(command(tmp_path / "run", **wrong)[3:])
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(settings, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="it is not a run, or choose another --out"):
        pretrain(settings(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_second_run_in_the_same_folder_is_refused(settings, tmp_path):
    pretrain(settings(tmp_path / "run", steps=2, optim=Optim(warmup=1)))
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(FileExistsError, match="go on with --resume, or choose another --out"):
        pretrain(settings(tmp_path / "run"))
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_a_resume_with_another_shape_is_refused_by_name(settings, shape, tmp_path):
    pretrain(settings(tmp_path / "run", steps=2, optim=Optim(warmup=1)))
    other = settings(tmp_path / "run", shape=shape | {"n_layers": 1}, resume=True)
    with pytest.raises(ValueError, match=r"another shape \(n_layers 2 and not 1\)"):
        pretrain(other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_tokens": 128}, "made with batch_tokens=64 and not 128; resume with the settings"),
        ({"seed": 18}, "made with seed=17 and not 18"),
        ({"optim": Optim(name="adamw", warmup=1)}, "made with optim.name=lion and not adamw"),
    ],
)
def test_a_resume_of_another_run_is_refused_and_overwrites_nothing(
    settings, tmp_path, other, message
):
    out = tmp_path / "run"
    pretrain(settings(out, steps=2, optim=Optim(warmup=1)))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=message):
        pretrain(settings(out, **{"steps": 3, "optim": Optim(warmup=1)} | other, resume=True))
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert before == after


def test_a_resume_with_another_tokenizer_or_other_rows_is_refused(
    settings, data, tmp_path, tmp_path_factory
):
    pretrain(settings(tmp_path / "run", steps=2, optim=Optim(warmup=1)))
    other = tmp_path / "rows"
    shutil.copytree(data, other)
    about = json.loads((other / "data.json").read_text())
    about["domains"]["hares"]["documents"] += 1
    (other / "data.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="made with data="):
        pretrain(settings(tmp_path / "run", data=other, resume=True))
    tokenizer = train_bpe(["quite other words"] * 9, 290)
    tokenizer.save(other / "tokenizer.json")
    (other / "data.json").write_text(json.dumps(about | {"tokenizer": tokenizer.sha256}))
    with pytest.raises(ValueError, match="made with tokenizer="):
        pretrain(settings(tmp_path / "run", data=other, resume=True))


def test_a_resume_without_a_good_checkpoint_says_what_is_wrong_with_each(settings, tmp_path):
    out = tmp_path / "run"
    pretrain(settings(out, steps=2, optim=Optim(warmup=1)))
    for path in out.glob("step-*"):
        (path / "config.json").unlink()
    message = r"no checkpoint that is whole \(step-000002: config.json is missing; step-000000"
    with pytest.raises(ValueError, match=message):
        pretrain(settings(out, resume=True))


def test_a_finished_model_is_not_made_anew_without_its_checkpoints(settings, tmp_path):
    out = tmp_path / "run"
    model = weights(pretrain(settings(out)))
    with pytest.raises(ValueError, match="has taken 12 steps, more than steps=8; go on with as"):
        pretrain(settings(out, steps=8, resume=True))
    with pytest.raises(ValueError, match="steps"):  # what it was begun with is still said
        pretrain(Pretrain.from_toml(out / "run.toml", steps=11, resume=True))
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    with pytest.raises(ValueError, match="has a model and no checkpoint to go on from"):
        pretrain(settings(out, resume=True))
    assert_identical(weights(out / "model"), model)
    assert Pretrain.from_toml(out / "run.toml").steps == 12


def test_a_run_of_another_verb_is_not_gone_on_with(settings, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.toml").write_text("beta = 0.1\n")
    with pytest.raises(ValueError, match=r"was begun with beta=0.1, which this verb does not have"):
        pretrain(settings(out, resume=True))
    assert (out / "run.toml").read_text() == "beta = 0.1\n"


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_beginning(settings, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(settings(whole))
    out.mkdir()
    (out / "run.toml.partial").write_text("ste")
    (out / ".lock").touch()
    pretrain(settings(out))
    shutil.rmtree(out / "model")
    for path in out.glob("step-*"):
        shutil.rmtree(path)
    (out / "partial-000000").mkdir()
    pretrain(settings(out, resume=True))
    assert_identical(weights(whole / "model"), weights(out / "model"))
    assert not (out / "partial-000000").exists()


def test_a_poisoned_run_goes_back_the_same_way_whatever_the_micro_batches(
    settings, tmp_path, monkeypatch
):
    """Which batches are left out is counted in steps, not in micro-batches."""
    from mptbook.data import loader
    from mptbook.model.mpt import MPT

    now, row_numbers, loss = [], loader.row_numbers, MPT.loss

    def noted(domains, batch_rows, seed, step, mixture):
        now[:] = [step * batch_rows]  # the first row of the order
        return row_numbers(domains, batch_rows, seed, step, mixture)

    def poisoned(model, *batch):
        at_fault = 36 <= now[0] < 40 and model.training  # the rows of step 10
        return loss(model, *batch) * (50 if at_fault else 1)

    monkeypatch.setattr(loader, "row_numbers", noted)
    monkeypatch.setattr(MPT, "loss", poisoned)
    guard = {"window": 5, "patience": 1, "lead": 2}
    for at_once in (64, 16):
        out = tmp_path / str(at_once)
        pretrain(settings(out, micro_batch_tokens=at_once, guard=guard))
        (line,) = [line for line in read_history(out) if line["kind"] == "rollback"]
        assert (line["step"], line["to"], line["skipped"]) == (10, 4, [7, 8, 9])
