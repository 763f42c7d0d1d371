import json

import pytest

from mptbook.bench import context
from mptbook.bench.context import NAMES, WARM_STEPS, BenchContext
from mptbook.bench.peers import LLAMA, MPT_PEER, OURS
from mptbook.bench.steps import Step

NO_ROOM = "you tried to allocate 805306368 bytes. Error code 12: can't allocate memory"
SETTINGS = {"tokens": [16, 32, 64], "batch_tokens": 32, "repeats": 3, "longest_seconds": 10}


class Scripted:
    """A `Worker` whose steps are told by `script`: (name, tokens) to seconds or an error."""

    script: dict = {}  # noqa: RUF012
    asked: list = []  # noqa: RUF012
    open_ones: set = set()  # noqa: RUF012

    def __init__(self, name, make, same_name, config, rows, precision, memory_gb):
        assert name == same_name
        self.name, self.tokens, self.rows = name, config.max_seq_len, rows
        assert not self.open_ones  # one process at a time
        self.open_ones.add((name, self.tokens))

    def ask(self):
        self.asked.append((self.name, self.tokens, self.rows))
        answer = self.script.get((self.name, self.tokens), 1.0)
        if isinstance(answer, Exception):
            raise answer
        return Step(answer, 2.0, 1000)

    def close(self):
        self.open_ones.discard((self.name, self.tokens))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def script(monkeypatch):
    script = {}
    for name, value in (("script", script), ("asked", []), ("open_ones", set())):
        monkeypatch.setattr(Scripted, name, value)
    monkeypatch.setattr(context, "Worker", Scripted)
    return script


def lengths_with_figures(found, name):
    return [tokens for tokens, one in found["contestants"][name].items() if one is not None]


def test_everyone_takes_as_many_steps_at_every_length(script):
    found = BenchContext(**SETTINGS).compare()
    assert found["ended"] == {}
    for name in NAMES:
        assert lengths_with_figures(found, name) == ["16", "32", "64"]
        for tokens, rows in ((16, 2), (32, 1), (64, 1)):
            assert Scripted.asked.count((name, tokens, rows)) == (WARM_STEPS + 1) * 3
            one = found["contestants"][name][str(tokens)]
            assert one["seconds"] == [1.0, 1.0, 1.0]
            assert one["tokens_per_second"] == rows * tokens
    assert not Scripted.open_ones


def test_each_round_begins_with_another(script):
    BenchContext(**SETTINGS | {"tokens": [16]}).compare()
    of_a_round = (WARM_STEPS + 1) * len(NAMES)
    assert [Scripted.asked[turn * of_a_round][0] for turn in range(3)] == [*NAMES]


def test_what_does_not_fit_has_no_figures_and_is_not_tried_on_longer_rows(script):
    script[MPT_PEER, 32] = RuntimeError(f"{MPT_PEER}: {NO_ROOM}")
    found = BenchContext(**SETTINGS, memory_gb=2).compare()
    assert lengths_with_figures(found, MPT_PEER) == ["16"]
    assert found["contestants"][MPT_PEER].keys() == {"16", "32", "64"}
    ended = found["ended"].pop(MPT_PEER)
    assert ended == {"tokens": 32, "reason": f"{MPT_PEER}: {NO_ROOM} (memory_gb=2)"}
    assert Scripted.asked.count((MPT_PEER, 32, 1)) == 1
    assert (MPT_PEER, 64, 1) not in Scripted.asked
    assert found["ended"] == {}
    assert lengths_with_figures(found, OURS) == ["16", "32", "64"]


def test_a_step_that_takes_too_long_is_the_last_and_counts(script):
    script[LLAMA, 32] = 11.0
    found = BenchContext(**SETTINGS).compare()
    assert found["contestants"][LLAMA]["32"]["seconds"] == [11.0]
    assert found["contestants"][LLAMA]["64"] is None
    assert found["ended"][LLAMA] == {
        "tokens": 32,
        "reason": "a step took 11 s, more than longest_seconds=10",
    }
    assert Scripted.asked.count((LLAMA, 32, 1)) == 1


def test_when_all_have_ended_the_longer_lengths_are_empty(script):
    for name in NAMES:
        script[name, 32] = RuntimeError(f"{name}: {NO_ROOM}")
    found = BenchContext(**SETTINGS).compare()
    assert found["ended"].keys() == set(NAMES)
    assert {one["64"] for one in found["contestants"].values()} == {None}


def test_any_other_failure_ends_the_bench(script):
    script[OURS, 16] = RuntimeError("mptbook: IndexError: index out of range in self")
    with pytest.raises(RuntimeError, match="index out of range"):
        BenchContext(**SETTINGS).compare()
    assert not Scripted.open_ones


def test_the_bench_prints_and_writes_what_it_found(script, tmp_path, capsys):
    script[MPT_PEER, 32] = RuntimeError(f"{MPT_PEER}: {NO_ROOM}")
    out = tmp_path / "context.json"
    BenchContext(**SETTINGS, out=out).run()
    found = json.loads(out.read_text())
    assert found["settings"]["tokens"] == [16, 32, 64]
    assert found["contestants"][MPT_PEER]["64"] is None
    printed = capsys.readouterr().out
    assert f"ended: {MPT_PEER}: {NO_ROOM}" in printed
    assert printed.count(MPT_PEER) == 3  # two lengths, and the reason
