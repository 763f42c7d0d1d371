"""Runs in stages, with a mixture of two domains, and of packed documents."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mptbook.__main__ import main
from mptbook.data.curriculum import Stage
from mptbook.data.prepare import Prepare, prepare
from mptbook.tokenizer.bpe import train_bpe
from mptbook.train.log import read_log
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain, pretrain
from mptbook.train.run import Run

STAGES = [
    Stage(tokens=5 * 64, row_tokens=16, mixture={"hares": 3, "foxes": 1}),
    Stage(tokens=3 * 128, row_tokens=32, batch_tokens=128, mixture={"hares": 1, "foxes": 1}),
    Stage(tokens=2 * 128, mixture={}, lr=0.5),
]


@pytest.fixture(scope="module")
def two_domains(data, tmp_path_factory):
    """A prepared folder with rows of 16 tokens."""
    folder = tmp_path_factory.mktemp("two")
    sources = {}
    for name in ("hares", "foxes"):
        lines = [{"text": f"Of {name}, {n} of {n * n}.\n"} for n in range(230)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        sources[name] = str(folder / f"{name}.jsonl")
    rows = folder / "rows"
    prepare(Prepare(out=rows, tokenizer=str(data), row_tokens=16, source=sources))
    return rows


@pytest.fixture
def settings(two_domains, shape):
    def make(out, **changes):
        values = {
            "data": two_domains,
            "out": out,
            "shape": shape,
            "steps": 10,
            "batch_tokens": 64,
            "heldout_every": 100,
            "save_every": 1,
            "keep": 99,
            "stages": STAGES,
            "optim": Optim(lr=1e-3, warmup=2),
        }
        return Pretrain(**(values | changes))

    return make


def assert_same_end(a, b):
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run / "step-000010" / name) for run in (a, b))
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def test_a_stage_sets_rows_batch_mixture_and_learning_rate(settings, tmp_path):
    out = tmp_path / "run"
    pretrain(settings(out))
    steps = read_log(out, "step")
    assert [line["targets"] for line in steps] == [64] * 5 + [128] * 5
    rates = Optim(lr=1e-3, warmup=2).rates(10)
    factors = [1.0] * 8 + [0.5] * 2
    assert [line["lr"] for line in steps] == [f * rates(n) for n, f in enumerate(factors)]
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["max_seq_len"] == 32


def test_the_rows_of_a_stage_are_of_its_length_and_mixture(settings, tmp_path):
    feed = Run.make(settings(tmp_path)).feed
    shapes = [
        next(feed.batches(number, start=first))[0].shape for number, first in enumerate((0, 5, 8))
    ]
    assert shapes == [(4, 16), (4, 32), (4, 32)]
    first, second = feed.drawn(0), feed.drawn(1)
    assert {domain.name: domain.rows for domain in first} == {"hares": 15, "foxes": 5}
    assert {domain.name: domain.rows for domain in second} == {"hares": 6, "foxes": 6}


@pytest.mark.parametrize("killed_after", [2, 5, 6, 8])
def test_a_run_resumed_at_any_step_ends_bit_identical(settings, tmp_path, killed_after):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for out in (whole, part):
        pretrain(settings(out))
    (part / "model").rename(tmp_path / "lost-model")
    for step in range(killed_after + 1, 11):
        (part / f"step-{step:06d}").rename(tmp_path / f"lost-{step}")
    pretrain(settings(part, resume=True))
    assert_same_end(whole, part)


def test_a_run_that_stops_between_stages_goes_on_to_the_same_end(settings, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    pretrain(settings(whole))
    assert pretrain(settings(part, until=5, save_every=99)) == part
    assert "step 5 of 10, saved; go on with --resume" in capsys.readouterr().out
    assert (part / "step-000005").is_dir()
    assert not (part / "model").exists()
    pretrain(settings(part, until=5, resume=True))  # as after a restart: nothing is left to do
    assert len(read_log(part, "step")) == 5
    pretrain(settings(part, resume=True))
    assert_same_end(whole, part)


def test_batches_of_stages_that_are_not_reached_may_be_for_others(settings, tmp_path):
    out, small = tmp_path / "run", {"micro_batch_tokens": 16}  # less than a row of later stages
    with pytest.raises(ValueError, match="micro_batch_tokens=16 is not a multiple of the 32"):
        pretrain(settings(out, **small))
    assert not out.exists()
    pretrain(settings(out, until=5, **small))
    with pytest.raises(ValueError, match="micro_batch_tokens=16 is not a multiple of the 32"):
        pretrain(settings(out, resume=True, **small))
    pretrain(settings(out, resume=True, micro_batch_tokens=128))  # more than a step had before
    assert len(read_log(out, "step")) == 10


def test_accumulation_does_not_change_what_a_stage_learns(settings, tmp_path, shape):
    shape = shape | {"resid_pdrop": 0.0}  # dropout would draw other numbers
    exact = {"shape": shape, "precision": "fp32", "optim": Optim(name="adamw", lr=1e-3, warmup=2)}
    for at_once in (None, 32):
        pretrain(settings(tmp_path / str(at_once), micro_batch_tokens=at_once, **exact))
    losses = [[line["loss"] for line in read_log(tmp_path / str(n), "step")] for n in (None, 32)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_guard_does_not_take_another_mixture_for_a_spike(settings, tmp_path):
    """After a switch it gathers losses anew, and a resume at the switch does so too."""
    run = Run.make(settings(tmp_path))
    for _ in range(run.guard.settings.window):
        run.guard.judge(2.0, 1.0)
    assert run.guard.deviations(9.0) > run.guard.settings.threshold
    run.guard.forget()
    assert run.guard.judge(9.0, 1.0) == ""


def test_a_batch_that_is_left_out_moves_up_those_of_its_stage_alone(settings, tmp_path):
    feed = Run.make(settings(tmp_path, micro_batch_tokens=32)).feed
    for number, first in enumerate((0, 5, 8)):
        n = feed.accumulate(number)

        def steps(skipped, count, number=number, first=first, n=n):
            stream = feed.batches(number, start=first, skipped=skipped)
            return [[next(stream)[0].tolist() for _ in range(n)] for _ in range(count)]

        every = steps([], 4)
        assert steps([first + 1], 3) == [every[0], *every[2:]]
    # One left out before: the stage begins one batch later, and takes none twice.
    assert steps([0], 3) == every[1:]


def test_stages_that_do_not_add_up_are_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(ValueError, match="the stages have 10 steps in all, but steps is 12; make"):
        pretrain(settings(tmp_path / "run", steps=12))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"hares": 1, "wolves": 1}}, "has no domain wolves; it has foxes, hares"),
        ({"mixture": {"hares": 0.0}}, "has a weight above 0; give one"),
        (
            {"mixture": {"hares": 1}, "repeat": False, "steps": 10_000},
            "hares has .* rows, and the run takes",
        ),
    ],
)
def test_a_mixture_that_the_data_cannot_give_is_refused(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(settings(tmp_path / "run", stages=[], **changes))
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_each_stage_takes_from_each_domain(settings, tmp_path, capsys):
    pretrain(settings(tmp_path / "run"))
    first, second, _ = read_log(tmp_path / "run", "stage")
    assert (first["step"], first["row_tokens"]) == (0, 16)
    assert (second["step"], second["row_tokens"]) == (5, 32)
    tokens = {domain["name"]: domain["tokens"] for domain in first["domains"]}
    assert tokens == {"hares": 15 * 16, "foxes": 5 * 16}
    said = capsys.readouterr().out
    assert "step 0  320 tokens in rows of 16, 64 a step: hares 75.0% (0." in said


def test_rows_whose_tokenizer_was_replaced_are_refused(two_domains, settings, tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(two_domains, rows)
    train_bpe(["another text"], 290).save(rows / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer that its rows were made with"):
        pretrain(settings(tmp_path / "run", data=rows))
    assert not (tmp_path / "run").exists()


def test_a_negative_weight_is_one_line_at_the_command_line(tmp_path, capsys):
    assert main(["pretrain", "--data", ".", "--out", str(tmp_path / "a"), "--mixture", "a=-1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "mixture.a='-1': input should be greater than or equal to 0" in said


def test_a_resume_with_other_stages_is_refused_but_the_last_may_grow(settings, tmp_path):
    out = tmp_path / "run"
    pretrain(settings(out))
    other = [STAGES[0].model_copy(update={"mixture": {"hares": 1}}), *STAGES[1:]]
    with pytest.raises(ValueError, match="made with stages="):
        pretrain(settings(out, stages=other, resume=True))
    longer = [*STAGES[:2], STAGES[2].model_copy(update={"tokens": 4 * 128})]
    pretrain(settings(out, stages=longer, steps=12, resume=True))
    assert read_log(out, "step")[-1]["step"] == 12


def test_packed_documents_train_apart(two_domains, settings, tmp_path):
    about = json.loads((two_domains / "data.json").read_text())
    rows = tmp_path / "rows"
    tokenizer = str(two_domains / "tokenizer.json")
    how = {"tokenizer": tokenizer, "row_tokens": 16, "packing": "whole"}
    prepare(Prepare(out=rows, source=about["sources"], **how))
    with pytest.raises(ValueError, match="kept apart; add --shape attn_uses_sequence_id=true"):
        pretrain(settings(tmp_path / "run", data=rows, stages=[]))
    assert not (tmp_path / "run").exists()
    apart = settings(tmp_path / "run", data=rows, stages=[])
    apart.shape["attn_uses_sequence_id"] = True
    pretrain(apart)
    steps = read_log(tmp_path / "run", "step")
    # First tokens and filling cost nothing.
    assert sum(line["targets"] for line in steps) < 64 * len(steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
