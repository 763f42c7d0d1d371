import json
from pathlib import Path

import pytest

from mptbook.__main__ import main
from mptbook.bench import racer, speedrun
from mptbook.bench.peers import GPT2, LLAMA, OURS, PEERS
from mptbook.bench.racer import Entry
from mptbook.bench.speedrun import (
    beside_peers,
    best,
    entries,
    order,
    race,
    seconds_to_reach,
    show,
)
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain

SHAPE = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}


def test_mptbook_runs_long_and_short_and_each_peer_at_each_rate():
    found = entries([GPT2, OURS], [1e-3, 3e-3], minutes=5, lr=6e-4)
    assert found == [
        Entry("mptbook", OURS, 6e-4, 300),
        Entry("mptbook, 2 minutes", OURS, 6e-4, 120),
        Entry("transformers' GPT-2, lr 0.001", GPT2, 1e-3, 300),
        Entry("transformers' GPT-2, lr 0.003", GPT2, 3e-3, 300),
    ]


def test_each_round_begins_one_place_later_and_asks_everybody_once():
    assert [order(turn, 3) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]


def test_entries_take_turns_until_their_budgets_are_used_up(monkeypatch, capsys):
    asked, closed = [], []

    class Puppet:
        """Trains by as many seconds as it is told, up to its budget."""

        def __init__(self, name, make, entry, settings, characters):
            assert (make, settings, characters) == (racer.start_racer, "recipe", 77)
            self.name, self.entry, self.seconds = name, entry, 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            closed.append(self.name)

        def ask(self, *question):
            asked.append((self.name, *question))
            if question[0] == "about":
                return {"parameters": 5}
            if question[0] == "look":
                return 9.0 - self.seconds / 4 if question[1] == "front" else 1.0
            self.seconds = min(self.seconds + question[1], self.entry.budget)
            return {"seconds": self.seconds, "steps": 1}

    monkeypatch.setattr(speedrun, "Worker", Puppet)
    entered = [Entry("a", OURS, 1.0, 10), Entry("b", GPT2, 2.0, 4)]
    found = race(entered, "recipe", slice_seconds=3, look_seconds=5, characters=77)
    train, front, everything = ("train", 3), ("look", "front"), ("look", "all")
    assert asked == [
        ("a", "about"),
        ("b", "about"),
        ("a", *train),  # round 1
        ("b", *train),
        ("b", *train),  # round 2: b is first, and at its 4 seconds done
        ("b", *front),
        ("b", *everything),
        ("a", *train),
        ("a", *front),  # at 6 seconds, the first slice that ends after 5
        ("a", *train),
        ("a", *train),
        ("a", *front),
        ("a", *everything),
    ]
    assert found[0]["curve"] == [[6, 7.5], [10, 6.5]]
    assert found[1] == {
        "label": "b",
        "contestant": GPT2,
        "lr": 2.0,
        "budget": 4,
        "parameters": 5,
        "seconds": 4,
        "steps": 1,
        "curve": [[4, 8.0]],
        "front": 8.0,
        "all": 1.0,
    }
    assert sorted(closed) == ["a", "b"]
    assert capsys.readouterr().out.count("bits per byte") == 3


def result(contestant, lr, front, everything, curve=(), budget=300):
    values = {"contestant": contestant, "lr": lr, "budget": budget, "front": front}
    rest = {"label": f"{contestant} {lr:g}", "seconds": 300.5, "steps": 1000, "tokens": 601_000}
    return values | rest | {"all": everything, "curve": [list(point) for point in curve]}


@pytest.mark.parametrize(
    ("losses", "lr", "at_edge"),
    [
        ([2.2, 2.0, 2.1], 3e-3, False),
        ([2.0, 2.1, 2.2], 1e-3, True),
        ([2.2, 2.1, 2.0], 6e-3, True),
        ([2.2, 2.1, None], 3e-3, False),  # a higher rate was tried, and diverged
        ([None, None, 2.0], 6e-3, True),
    ],
)
def test_the_best_rate_counts_and_the_edge_of_the_grid_is_flagged(losses, lr, at_edge):
    rates = [1e-3, 3e-3, 6e-3]
    runs = [result(GPT2, r, loss, loss) for r, loss in zip(rates, losses, strict=True)]
    found = best(runs, rates)
    assert (found["lr"], found["at_edge"]) == (lr, at_edge)
    assert "at_edge" not in runs[0]


def test_without_a_training_that_ended_none_is_the_best():
    assert best([result(GPT2, 1e-3, None, None)], [1e-3]) is None


CURVE = [[30, 3.0], [60, 2.5], [90, 2.6], [120, 2.0]]


@pytest.mark.parametrize(
    ("level", "seconds"),
    [
        (3.5, 30),  # at the first look already: before it nothing is known
        (2.75, 45),
        (2.5, 60),
        (2.4, 100),  # a third of the way from 2.6 to 2.0
        (1.9, None),
    ],
)
def test_a_curve_reaches_a_level_on_the_line_between_two_looks(level, seconds):
    found = seconds_to_reach(CURVE, level)
    assert found == (seconds and pytest.approx(seconds))


def test_a_look_without_a_number_reaches_nothing_and_starts_no_line():
    assert seconds_to_reach([[30, 3.0], [60, None], [90, 2.0]], 2.5) == 90
    assert seconds_to_reach([[30, None]], 2.5) is None


def test_the_two_runs_of_mptbook_are_held_against_the_best_of_each_peer(capsys):
    results = [
        result(OURS, 6e-4, 2.0, 1.9, CURVE),
        result(OURS, 6e-4, 2.4, 2.3, budget=120),
        result(GPT2, 1e-3, 2.5, 2.2),
        result(GPT2, 3e-3, 2.7, 2.4),
        result(LLAMA, 1e-3, None, None),
        result(LLAMA, 3e-3, None, None),
    ]
    found = beside_peers(results, [1e-3, 3e-3])
    assert found[LLAMA] is None
    peer = found[GPT2]
    assert (peer["lr"], peer["at_edge"], "curve" in peer) == (1e-3, True, False)
    assert peer["ratio"] == pytest.approx({"front": 2.0 / 2.5, "all": 1.9 / 2.2})
    assert peer["seconds_to_reach"] == pytest.approx(60)
    assert peer["short_is_below"] == {"front": True, "all": False}
    show(results, found)
    lines = capsys.readouterr().out.splitlines()
    assert "mptbook 0.0006                      0.0006     2,000  1,000   2.0000  1.9000" in lines
    assert "transformers' GPT-2, best at lr 0.001, at the edge of the grid; mptbook" in lines
    assert "  after 60 s reaches its front of 2.5000" in lines
    assert "  in a run of 120 s ends not below its 2.2000 (all)" in lines
    assert "transformers' LLaMA diverged at every rate" in lines


def test_a_run_of_mptbook_that_diverged_is_below_nothing(capsys):
    results = [
        result(OURS, 6e-4, None, None, [[30, None]]),
        result(OURS, 6e-4, None, None, budget=120),
        result(GPT2, 1e-3, 2.5, 2.2),
    ]
    found = beside_peers(results, [1e-3])
    assert found[GPT2]["ratio"] == {"front": None, "all": None}
    assert found[GPT2]["seconds_to_reach"] is None
    assert found[GPT2]["short_is_below"] == {"front": False, "all": False}
    show(results, found)
    assert "does not reach its front of 2.5000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("mptbook,gpt-3", "'gpt-3' is not one of mptbook, transformers' MPT"),
        (GPT2, "mptbook must be one of them: the others are compared with it"),
    ],
)
def test_contestants_that_cannot_be_are_refused(names, message, capsys):
    assert main(["bench", "speedrun", "--data", "rows", "--contestants", names]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def small(data, monkeypatch):
    """A recipe with a model that trains in no time, instead of tiny.toml."""
    optim = Optim(lr=0.02, schedule="trapezoid", warmup=3, floor=0.0, decay=0.5)
    recipe = Pretrain(
        data=Path(), out=Path(), shape=SHAPE, steps=30, batch_tokens=64, optim=optim, device="cpu"
    )
    monkeypatch.setattr(speedrun, "tiny_run", lambda: recipe)
    return ["bench", "speedrun", "--data", str(data), "--characters", "300"]


def test_a_folder_that_is_not_prepared_is_one_line_before_any_process_starts(
    small, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(speedrun, "Worker", None)
    assert main([*small, "--data", str(tmp_path)]) == 2
    assert f"{tmp_path} is not prepared" in capsys.readouterr().err


def test_all_contestants_race_and_the_file_holds_what_was_printed(
    small, tmp_path, monkeypatch, capsys
):
    class InProcess:
        def __init__(self, name, make, *arguments):
            self.answer = make(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *_): ...

        def ask(self, *question):
            return self.answer(*question)

    ticks = iter(range(10**6))
    monkeypatch.setattr(racer, "perf_counter", lambda: next(ticks))  # a step takes 1 second
    monkeypatch.setattr(racer, "keep_freed_memory", lambda: True)  # of this process
    monkeypatch.setattr(speedrun, "Worker", InProcess)
    out = tmp_path / "figures.json"
    times = ["--minutes", "1", "--slice-seconds", "15", "--look-seconds", "30"]
    assert main([*small, *times, "--rates", "0.003,0.01", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["machine"]["command"]
    assert found["seed"] == 17
    assert found["recipe"]["optim"]["lr"] == 0.02
    assert "data" not in found["settings"]
    runs = found["trainings"]
    assert len(runs) == 2 + 2 * len(PEERS)
    for run in runs:
        assert run["seconds"] == run["steps"] == run["budget"]
        assert run["tokens"] == 64 * run["steps"]
        assert run["curve"][-1] == [run["seconds"], run["front"]]
        assert run["loss"] > 0
        assert run["refused"] == 0
    assert [at for at, _ in runs[0]["curve"]] == [30, 60]
    assert [at for at, _ in runs[1]["curve"]] == [24]
    assert runs[0]["all"] < runs[1]["all"]  # more steps of the same
    assert list(found["peers"]) == list(PEERS)
    printed = capsys.readouterr().out
    for run in runs:
        assert f"{run['all']:.4f}" in printed
    for peer, rival in found["peers"].items():
        mine = [run["all"] for run in runs if run["contestant"] == peer]
        assert rival["all"] == min(mine)
        assert rival["ratio"]["all"] == pytest.approx(runs[0]["all"] / min(mine))


def test_mptbook_races_alone_in_processes_of_its_own(small, tmp_path):
    out = tmp_path / "figures.json"
    times = ["--minutes", "0.01", "--slice-seconds", "0.2", "--look-seconds", "0.3"]
    assert main([*small, *times, "--contestants", "mptbook", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["peers"] == {}
    for run, budget in zip(found["trainings"], (0.6, 0.24), strict=True):
        assert run["seconds"] >= run["budget"] == pytest.approx(budget)
        assert run["steps"] > 0
        assert run["all"] > 0
