"""The log of a run: whole lines of strict JSON, whatever became of the process."""

import json

import pytest

from mptbook.train.log import RunLog, read_history, read_log
from mptbook.train.loop import StepLog


def step(n, loss=2.0, refused=""):
    return StepLog(step=n, loss=loss, grad_norm=1.0, lr=0.1, targets=8, refused=refused)


def test_what_is_not_finite_is_null_and_every_line_is_strict_json(tmp_path, capsys):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    with RunLog(tmp_path, steps=2) as log:
        log.step(step(1, loss=float("nan"), refused="the loss is nan"))
        log.heldout("heldout", 1, float("inf"), {"novels": float("nan")})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert parsed[0]["loss"] is None
    assert (parsed[1]["bits_per_byte"], parsed[1]["domains"]) == (None, {"novels": None})
    assert "step 1  not taken: the loss is nan" in capsys.readouterr().out


def test_a_line_that_a_kill_cut_in_two_is_dropped_and_the_next_run_starts_a_new_one(tmp_path):
    with RunLog(tmp_path, steps=2) as log:
        log.step(step(1))
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "st')
    assert [line["step"] for line in read_history(tmp_path)] == [1]
    with RunLog(tmp_path, steps=2, start=1) as log:
        log.step(step(2))
    assert [line["step"] for line in read_history(tmp_path)] == [1, 2]


def test_a_stopped_and_resumed_log_counts_each_step_once(tmp_path):
    lines = [{"kind": "step", "step": n, "loss": loss} for n, loss in ((1, 9), (2, 8), (2, 7))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path, "step")] == [(1, 9), (2, 7)]
    assert [line["loss"] for line in read_history(tmp_path)] == [9, 8, 7]


def test_no_log_is_an_error_that_says_what_a_run_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="a run of mptbook pretrain"):
        read_log(tmp_path, "step")
