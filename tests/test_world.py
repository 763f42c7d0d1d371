"""What processes tell each other before and beside their work."""

import pytest
import torch
from processes import run, torchrun

from mptbook import world

TALK = """
import sys

import torch
from mptbook import world

with world.joined(torch.device("cpu"), 20):
    rank = world.rank()
    assert world.total([rank, 0.5]) == [3.0, 1.5]
    assert not world.all_say(rank > 0)
    assert world.all_say(True)
    assert world.from_first(lambda: f"said by {rank}") == "said by 0"
    assert world.together(lambda: {str(rank): rank * 10}) == {"0": 0, "1": 10, "2": 20}
    for told in (world.from_first, world.together):
        failing = rank == (0 if told is world.from_first else 1)
        try:
            told(lambda: {} if not failing else {}["what only one lacks"])
        except KeyError as error:
            assert "only one lacks" in str(error)
        else:
            sys.exit(5)
print("all told", rank)
"""

MIXED = """
import os
import sys

import torch
from mptbook import world

try:
    with world.joined(torch.device(["cpu", "cuda"][int(os.environ["RANK"])]), 20):
        pass
except ValueError as error:
    sys.exit(f"error: {error}")
"""


def script(folder, text):
    (folder / "script.py").write_text(text)
    return folder / "script.py"


def test_what_one_process_knows_or_fails_at_all_hear(tmp_path):
    code, said = run(torchrun(3, script(tmp_path, TALK)))
    assert code == 0, said
    assert said.count("all told") == 3


def test_processes_on_different_devices_are_refused_at_once(tmp_path):
    code, said = run(torchrun(2, script(tmp_path, MIXED)))
    assert code != 0
    assert said.count("process 0 computes on cpu and process 1 on cuda, which do not talk") >= 1
    assert "give all the same --device" in said


def test_a_program_alone_is_a_world_of_one():
    assert (world.rank(), world.size(), world.launched()) == (0, 1, False)
    assert world.total([2.0, 3.0]) == [2.0, 3.0]
    assert world.from_first(lambda: 7) == 7
    assert world.together(lambda: {"a": 1}) == {"a": 1}
    with world.joined(torch.device("cpu")):
        assert world.size() == 1
    with pytest.raises(ZeroDivisionError):
        world.from_first(lambda: 1 / 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    assert world.device().type == "cpu"
    with pytest.raises(ValueError, match="device is cuda:1, but no CUDA device is here"):
        world.device("cuda:1")


def test_an_error_is_told_once_and_a_missing_process_once_a_machine(monkeypatch):
    mistake, missing = ValueError("x"), world.Missing("x")
    told = {}
    for rank, local in ((0, 0), (1, 1), (8, 0), (9, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        told[rank] = world.speaks(mistake), world.speaks(missing)
    assert told == {0: (True, True), 1: (False, False), 8: (False, True), 9: (False, False)}


ALONE = """
import os, sys, time
from mptbook import world
from mptbook.__main__ import main

late, alone, world.FIRST_WORD = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rank = int(os.environ["RANK"])
time.sleep(late * (rank == 0) + 60 * alone * (rank != alone))
sys.exit(main(["history", "nowhere"]))
"""


@pytest.mark.parametrize("words", [(4, 0, 60), (0, 1, 0.5)], ids=["the first", "the only one"])
def test_the_process_that_meets_an_error_last_or_alone_tells_of_it(tmp_path, words):
    code, said = run(torchrun(2, script(tmp_path, ALONE), *words))
    assert code != 0
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "nowhere" in line
