"""The log of a run: whole lines of strict JSON, whatever became of the process."""

import json

import pytest

from mptbook.train.history import decisions, plot_history, told
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


@pytest.fixture
def eventful(tmp_path):
    with RunLog(tmp_path, steps=4) as log:
        log.event("started", 0, resumed=False)
        log.step(step(1, loss=5.0))
        log.event("saved", 1, path="step-000001")
        log.step(step(2, loss=40.0, refused="the loss 40.000 is 7.0 standard deviations above"))
        log.event("rollback", 2, to=1, skipped=[0, 1], reason="the loss 40.000")
        log.event("unsaved", 2, error="no room")
        log.event("stopped", 2, by="SIGTERM")
        log.event("started", 1, resumed=True)
        log.event("damaged", 1, path="step-000002", what="SHA256SUMS is missing")
        log.step(step(2, loss=4.0))
        log.step(step(3, loss=float("inf"), refused="the loss is inf"))
    return tmp_path


def test_the_decisions_of_a_run_are_told_in_order(eventful):
    assert [told(line) for line in decisions(eventful)] == [
        "step 0  started",
        "step 2  not taken: the loss 40.000 is 7.0 standard deviations above",
        "step 2  back to step 1, leaving out 2 batches: the loss 40.000",
        "step 2  no checkpoint: no room",
        "step 2  stopped by SIGTERM",
        "step 1  resumed",
        "step 1  passed over step-000002: SHA256SUMS is missing",
        "step 3  not taken: the loss is inf",
    ]


def test_the_picture_shows_what_was_undone_and_what_stayed(eventful):
    above, _ = plot_history(eventful).axes
    every, kept, *_ = above.get_lines()
    assert every.get_ydata().tolist()[:3] == [5.0, 40.0, 4.0]
    assert [y for y in kept.get_ydata() if y == y] == [5.0, 4.0]
    crosses = [line.get_xydata().tolist() for line in above.get_lines() if line.get_marker() == "x"]
    assert crosses == [[[2.0, 40.0]]]


def test_the_command_tells_and_draws(eventful, tmp_path, capsys):
    from mptbook.__main__ import main

    picture = tmp_path / "history.png"
    assert main(["history", str(eventful), "--plot", str(picture)]) == 0
    assert "back to step 1" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
