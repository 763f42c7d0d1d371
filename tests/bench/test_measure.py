import json
import mmap
import operator
import os
import sys
import time

import pytest
import torch

from mptbook.bench.measure import (
    LIBRARIES,
    added_memory,
    in_turns,
    machine,
    medians,
    noise,
    peak_memory,
    rotated,
    save,
)


class Clock:
    """Time that passes only in `work`."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def work(self, name, *seconds):
        left = list(seconds)

        def run():
            self.calls.append(name)
            self.now += left.pop(0)

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_the_median_of_the_rounds_counts_and_not_the_first_call(clock):
    runs = {"a": clock.work("a", 900, 3, 1, 50), "b": clock.work("b", 800, 7, 70, 7.5)}
    assert medians(runs, repeats=3) == {"a": 3, "b": 7.5}


def test_every_round_calls_each_once_and_begins_with_another(clock):
    medians({name: clock.work(name, *[1] * 5) for name in "abc"}, repeats=4)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_each_repetition_is_told_and_not_the_first_call(clock):
    runs = {"a": clock.work("a", 900, 3, 1, 50), "b": clock.work("b", 800, 7, 70, 7.5)}
    assert in_turns(runs, repeats=3) == {"a": [3, 1, 50], "b": [7, 70, 7.5]}


def test_rotation_keeps_the_order():
    assert rotated("abc", 5) == ["c", "a", "b"]
    assert rotated([], 5) == []


def test_noise_is_half_the_distance_of_the_quartiles_over_the_median():
    assert noise([10, 100, 30, 20, 0]) == (30 - 10) / 2 / 20
    assert noise([7.0, 7.0]) == 0
    assert noise([7.0]) is None


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")


@linux
def test_the_peak_of_a_call_is_about_what_it_allocates():
    size = 100_000_000
    # `mul` repeats a byte: as many bytes as its last argument says.
    assert peak_memory(operator.mul, b"x", size) == pytest.approx(size, rel=0.1)


@linux
def test_added_memory_is_a_peak_that_stays_when_memory_is_given_back():
    added = added_memory()
    assert added() < 10_000_000
    with mmap.mmap(-1, 100_000_000) as held:  # fresh pages, whatever earlier tests have left free
        held[::4096] = bytes(len(range(0, len(held), 4096)))
    assert added() == pytest.approx(100_000_000, rel=0.1)


@linux
def test_a_process_that_ends_too_early_is_named_with_its_exit_code():
    with pytest.raises(MemoryError, match=r"_exit\(77,\) ended with exit code 16"):
        peak_memory(os._exit, 77)  # the call with 16 goes first


def test_figures_come_with_the_machine_and_its_libraries():
    found = machine()
    assert found["versions"].keys() == set(LIBRARIES)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        found["versions"]["torch"] == torch.__version__
    )
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "figures.json"
    save({"seconds": 1.5, "name": "é"}, path)
    before = path.read_text()
    assert json.loads(before) == {"seconds": 1.5, "name": "é"}
    with pytest.raises(TypeError):
        save({"seconds": object()}, path)
    assert path.read_text() == before
    assert [x.name for x in path.parent.iterdir()] == ["figures.json"]
