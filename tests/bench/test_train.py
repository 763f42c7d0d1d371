import json
from itertools import count

import pytest
import torch

from mptbook.bench import steps, train
from mptbook.bench.steps import Step
from mptbook.bench.train import (
    NAMES,
    PRODUCT,
    WARM_STEPS,
    BenchTrain,
    plot,
    prepared_batches,
    product,
)

TINY = {"d_model": 48, "n_layers": 2, "n_heads": 3, "vocab_size": 37}
SETTINGS = TINY | {"row_tokens": [17], "batch_tokens": 51, "repeats": 5, "precision": "bf16"}


class Here:
    """A `Worker` that works in this process and notes whose turn it was."""

    turns: list[str] = []  # noqa: RUF012

    def __init__(self, name, make, *arguments):
        self.name, self.make, self.arguments, self.answer = name, make, arguments, None

    def ask(self):
        self.turns.append(self.name)
        self.answer = self.answer or self.make(*self.arguments)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(Here, "turns", [])
    monkeypatch.setattr(train, "Worker", Here)
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(train, "PRODUCT_WIDTH", 64)
    monkeypatch.setattr(train, "PRODUCT_SECONDS", 0.01)
    monkeypatch.setattr(train, "IMPORTS", ("pass",))
    monkeypatch.setattr(train, "prepared_batches", lambda folder, row_tokens, rows: count())


def test_everyone_takes_one_step_a_round_and_each_round_begins_with_another(monkeypatch):
    monkeypatch.setattr(train, "contestant", lambda *a: lambda: Step(1.0, 2.0, 3))
    BenchTrain(**SETTINGS).take_turns(17, 3)
    everyone = [*NAMES, PRODUCT]
    rounds = [Here.turns[i : i + 5] for i in range(0, len(Here.turns), 5)]
    assert len(rounds) == WARM_STEPS + 5
    for turn, names in enumerate(rounds):
        assert sorted(names) == sorted(everyone)
        assert names[0] == everyone[turn % 5]


def test_the_first_steps_are_left_out(monkeypatch):
    def numbered(*_):
        numbers = count()
        return lambda: Step(float(next(numbers)), 2.0, 3)

    monkeypatch.setattr(train, "contestant", numbered)
    taken, rates, waits = BenchTrain(**SETTINGS).take_turns(17, 3)
    for name in NAMES:
        assert [step.seconds for step in taken[name]] == [2, 3, 4, 5, 6]
    assert len(rates) == len(waits) == 5


def test_the_bench_writes_every_figure(tmp_path, capsys):
    out = tmp_path / "train.json"
    BenchTrain(**SETTINGS, out=out).run()
    found = json.loads(out.read_text())
    (shape,) = found["shapes"]
    assert (shape["row_tokens"], shape["rows"]) == (17, 3)
    assert shape["contestants"].keys() == set(NAMES)
    for name, one in shape["contestants"].items():
        assert len(one["seconds"]) == 5
        assert one["tokens_per_second"] == pytest.approx(51 / one["median_seconds"])
        ours = shape["contestants"]["mptbook"]["median_seconds"]
        assert one["times_mptbook"] == pytest.approx(one["median_seconds"] / ours)
        flops = steps.flops_per_token(name, BenchTrain(**SETTINGS).config(17))
        assert one["flops_per_token"] == flops
        assert one["flops_per_second"] == pytest.approx(flops * one["tokens_per_second"])
        share = one["flops_per_second"] / shape["product"]["flops_per_second"]
        assert one["share_of_product"] == pytest.approx(share)
    assert 0 < shape["wait_for_data"]["share"] < 1
    assert found["imports"]["pass"]["median_seconds"] > 0
    assert found["settings"]["precision"] == "bf16"
    assert "3 rows of 17 tokens a step" in capsys.readouterr().out


def test_a_product_takes_two_flops_for_each_pair_of_numbers(monkeypatch):
    times = iter([0.0, 0.0, 0.004, 0.004, 0.006, 99.0])  # products of 4 and of 2 ms
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(times))
    assert product("fp32")() == pytest.approx(2 * 64**3 / 0.002)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float)])
def test_the_product_has_the_precision_of_the_run(precision, dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(train.torch, "mm", lambda a, b: seen.append((a.dtype, a.shape, b.dtype)))
    product(precision)()
    assert set(seen) == {(dtype, (64, 64), dtype)}


def test_prepared_rows_are_batches_of_the_shape_asked_for(tmp_path):
    stream = prepared_batches(tmp_path, 17, 3)
    (x, y), (x_next, _) = next(stream), next(stream)
    assert x.shape == y.shape == (3, 17)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, x_next)
    assert x.max() < 1024


def test_rows_that_do_not_make_a_step_are_refused():
    for tokens, way_out in ((20, 340), (52, 884)):
        with pytest.raises(ValueError, match=f"batch_tokens=51 is not .* multiple of {way_out}"):
            BenchTrain(**SETTINGS | {"row_tokens": [17, tokens]}).run()
    assert not Here.turns  # before any work


def test_the_figure_has_the_milliseconds_and_the_least_that_the_products_need(tmp_path):
    contestant = {"median_seconds": 0.2, "noise": 0.05, "flops_per_second": 3e11}
    shape = {
        "row_tokens": 17,
        "rows": 3,
        "product": {"flops_per_second": 4e11},
        "contestants": {"one": contestant, "other": contestant | {"median_seconds": 0.5}},
    }
    figure = plot([shape, shape])
    figure.savefig(tmp_path / "steps.svg")
    assert (tmp_path / "steps.svg").stat().st_size > 1000
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([200, 500])
        marks = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
        assert [150, 150] in [pytest.approx(mark) for mark in marks]
        assert [375, 375] in [pytest.approx(mark) for mark in marks]
