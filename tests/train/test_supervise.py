"""When a supervised run is started again. That it then goes on is shown in test_faults.py."""

import pytest

from mptbook.train import supervise
from mptbook.train.pretrain import Pretrain


def supervised(monkeypatch, codes, **changes):
    """Whether each start was told to resume, for processes that end with these codes."""
    told, codes = [], list(codes)

    def run_once(verb, settings, child, resume):
        told.append(resume)
        return codes.pop(0)

    monkeypatch.setattr(supervise, "_run_once", run_once)
    settings = Pretrain(out="run", data="rows", supervise=True, **changes)
    try:
        supervise.supervise("pretrain", settings)
    finally:
        assert not codes
    return told


def test_crashes_are_followed_by_resumes(monkeypatch, capsys):
    assert supervised(monkeypatch, [-9, 1, 0]) == [False, True, True]
    assert capsys.readouterr().out.splitlines() == [
        "the training process ended with signal SIGKILL",
        "the training process ended with exit code 1",
    ]


def test_what_was_asked_to_resume_resumes_at_once(monkeypatch):
    assert supervised(monkeypatch, [0], resume=True) == [True]


def test_restarts_are_bounded(monkeypatch):
    with pytest.raises(supervise.GaveUp, match="gave up after 2 restarts"):
        supervised(monkeypatch, [-9, -9, -9], restarts=2)


@pytest.mark.parametrize("code", [2, 3, 75, 130])
def test_an_end_that_another_start_would_not_change_is_final(monkeypatch, code):
    with pytest.raises(supervise.Finished) as raised:
        supervised(monkeypatch, [code])
    assert raised.value.code == code


def test_the_child_is_the_real_command_and_gets_every_setting(tmp_path, capfd):
    settings = Pretrain(out=tmp_path / "run", data=tmp_path / "nowhere", supervise=True)
    with pytest.raises(supervise.Finished) as raised:
        supervise.supervise("pretrain", settings)
    assert raised.value.code == 2
    assert f"error: {tmp_path / 'nowhere'} is not prepared" in capfd.readouterr().err
