"""Whole runs, most of them through the command line in a process of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from mptbook.data.prepare import Prepare, prepare
from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.log import read_log
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain, pretrain

SHAPE = {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 320, "resid_pdrop": 0.1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    words = "hare ran miles over the hill and far away from here to there".split()
    texts = [" ".join(words[(n * k) % 13] for k in range(1, 40)) + ".\n" for n in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    train_bpe(texts, 300).save(folder / "tokenizer.json")
    source = {"hares": str(folder / "texts.jsonl")}
    tokenizer = str(folder / "tokenizer.json")
    prepare(Prepare(out=folder / "rows", tokenizer=tokenizer, row_tokens=16, source=source))
    return folder / "rows"


def settings(data, out, **changes):
    values = {
        "data": data,
        "out": out,
        "shape": SHAPE,
        "steps": 12,
        "batch_tokens": 64,
        "heldout_every": 5,
        "save_every": 4,
        "optim": Optim(lr=1e-3, warmup=2),
    }
    return Pretrain(**(values | changes))


def flags(rows, out, **changes):
    values = {"data": rows, "out": out, "steps": 12, "batch_tokens": 64, "optim.warmup": 2}
    shape = [word for key, value in SHAPE.items() for word in ("--shape", f"{key}={value}")]
    rest = [word for key, value in (values | changes).items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "mptbook", "pretrain", *shape, *rest]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_a_run_leaves_a_log_checkpoints_and_a_model_directory(data, tmp_path):
    from mptbook import Tokenizer, generate, load_model

    out = tmp_path / "run"
    assert pretrain(settings(data, out)) == out / "model"
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
def test_a_resumed_run_ends_bit_identical_to_an_unbroken_one(data, tmp_path, at_once):
    # dropout is on, so the random state matters too
    pretrain(settings(data, tmp_path / "whole", micro_batch_tokens=at_once))
    part = tmp_path / "part"
    pretrain(settings(data, part, micro_batch_tokens=at_once))
    for path in (part / "step-000012", part / "model"):
        path.rename(tmp_path / f"lost-{path.name}")
    pretrain(settings(data, part, micro_batch_tokens=at_once, resume=True))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_identical(
            load_file(tmp_path / "whole" / "step-000012" / name),
            load_file(part / "step-000012" / name),
        )
    whole, again = (read_log(tmp_path / name, "step") for name in ("whole", "part"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in again]


def test_a_checkpoint_removes_what_killed_processes_left_half_written(data, tmp_path):
    pretrain(settings(data, tmp_path / "run"))
    for name in ("partial-000004", ".partial-000004-x1"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "model.safetensors").write_text("half")
    pretrain(settings(data, tmp_path / "run", steps=13, resume=True))
    assert not list((tmp_path / "run").glob("*partial*"))
    assert (tmp_path / "run" / "step-000013" / "state.json").exists()


def test_accumulated_micro_batches_train_like_a_whole_batch(data, tmp_path):
    shape = SHAPE | {"resid_pdrop": 0.0}
    how = {"shape": shape, "precision": "fp32", "steps": 3, "optim": Optim(name="adamw", warmup=1)}
    pretrain(settings(data, tmp_path / "a", **how))
    pretrain(settings(data, tmp_path / "b", micro_batch_tokens=16, **how))
    a, b = (read_log(tmp_path / name, "step") for name in "ab")
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)


def test_documents_are_kept_apart_where_the_shape_says_so(data, tmp_path):
    losses = []
    for apart in (False, True):
        shape = SHAPE | {"attn_uses_sequence_id": apart, "resid_pdrop": 0.0}
        out = tmp_path / str(apart)
        pretrain(settings(data, out, shape=shape, steps=1, optim=Optim(warmup=0)))
        losses.append(read_log(out, "step")[0]["loss"])
    assert losses[0] != losses[1]


def test_activations_are_recomputed_where_the_run_says_so(data, tmp_path, monkeypatch):
    from mptbook.model import mpt

    calls = []
    original = mpt.checkpoint
    monkeypatch.setattr(mpt, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    for recompute, expected in ((False, 0), (True, SHAPE["n_layers"])):
        out = tmp_path / str(recompute)
        pretrain(settings(data, out, steps=1, recompute=recompute, optim=Optim(warmup=0)))
        assert len(calls) == expected


def test_the_settings_file_of_a_run_repeats_it(data, tmp_path):
    pretrain(settings(data, tmp_path / "first"))
    repeated = Pretrain.from_toml(tmp_path / "first" / "run.toml", out=tmp_path / "second")
    pretrain(repeated)
    assert_identical(weights(tmp_path / "first" / "model"), weights(tmp_path / "second" / "model"))


def test_ctrl_c_saves_and_resume_ends_like_an_unbroken_run(data, tmp_path):
    command = flags(data, tmp_path / "run", steps=400, save_every=400, heldout_every=400)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 20):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "run").glob("step-*"))) == 2  # the first, and this
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    whole = flags(data, tmp_path / "whole", steps=400, save_every=400, heldout_every=400)
    subprocess.run(whole, check=True, capture_output=True)
    assert_identical(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": "-3"}, "steps='-3': input should be greater than 0"),
        ({"optim.lrr": "1"}, "optim.lrr is not a setting; did you mean optim.lr?"),
        ({"optim.schedule": "step"}, "optim.schedule='step': input should be 'cosine'"),
        ({"optim.warmup": "12"}, "warmup is 12 steps of 12; it must be shorter than the run"),
        ({"batch_tokens": "70"}, "batch_tokens=70 is not a multiple of the 16 tokens of a row"),
        ({"micro_batch_tokens": "48"}, "is not a multiple of micro_batch_tokens=48; take 48"),
        ({"model": "mpt-7c"}, "did you mean mpt-7b?"),
        ({"shape": "n_head=3"}, "n_head is not a field of an MPT configuration; did you mean"),
        ({"shape": "vocab_size=299"}, "has 300 ids, the model only 299"),
        ({"device": "cuda"}, "device is cuda, but no CUDA device is here; use --device cpu"),
        ({"data": "nowhere"}, "nowhere is not prepared; run: mptbook prepare"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one case says that there is no CUDA")
def test_a_mistake_is_one_line_and_exit_code_2(data, tmp_path, wrong, message, capsys):
    from mptbook.__main__ import main

    code = main(flags(data, tmp_path / "run", **wrong)[3:])
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="it is not a run, or choose another --out"):
        pretrain(settings(data, tmp_path))
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_second_run_in_the_same_folder_is_refused(data, tmp_path):
    pretrain(settings(data, tmp_path / "run", steps=2, optim=Optim(warmup=1)))
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with pytest.raises(FileExistsError, match="go on with --resume, or choose another --out"):
        pretrain(settings(data, tmp_path / "run"))
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_a_resume_with_another_shape_is_refused_by_name(data, tmp_path):
    pretrain(settings(data, tmp_path / "run", steps=2, optim=Optim(warmup=1)))
    other = settings(data, tmp_path / "run", shape=SHAPE | {"n_layers": 1}, resume=True)
    with pytest.raises(ValueError, match=r"another shape \(n_layers 2 and not 1\)"):
        pretrain(other)


def test_a_stopped_and_resumed_log_counts_each_step_once(tmp_path):
    lines = [{"kind": "step", "step": n, "loss": loss} for n, loss in ((1, 9), (2, 8), (2, 7))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path, "step")] == [(1, 9), (2, 7)]
