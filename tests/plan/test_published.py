"""The table of measurements is the published one, and what is drawn from it is what it says."""

import pytest

from mptbook import plan
from mptbook.model.config import MPTConfig
from mptbook.plan.memory import Setup
from mptbook.plan.published import Measured, expected_mfu, measured, nearest
from mptbook.plan.run import training


@pytest.mark.parametrize("row", measured(), ids=str)
def test_mfu_is_the_published_one_to_the_digits_given(row):
    peak, speed = plan.GPUS[row.gpu].peak_flops, row.tokens_per_second_per_gpu
    # The table cuts the throughput to a whole number, so the truth lies below the next one.
    low, high = (100 * plan.mfu(row.config, speed + n, row.row_tokens, peak) for n in (0, 1))
    assert low - 0.005 <= 100 * row.mfu <= high + 0.005


@pytest.mark.parametrize(
    ("gpu", "size", "row_tokens", "gpus", "percent", "speed"),
    [  # as a second reader took them from the file
        ("H100-80GB", "7b", 65_536, 8, 28.59, 1956),
        ("H100-80GB", "30b", 2048, 512, 40.27, 2115),
        ("H100-80GB", "70b", 2048, 512, 41.25, 1007),
        ("A100-80GB", "7b", 2048, 8, 64.23, 4641),
        ("A100-80GB", "30b", 8192, 8, 39.38, 574),
        ("A100-40GB", "70b", 2048, 128, 48.91, 376),
        ("A100-40GB", "3b", 2048, 8, 57.82, 10_065),
    ],
)
def test_rows_are_as_in_the_file(gpu, size, row_tokens, gpus, percent, speed):
    (row,) = (
        r
        for r in measured()
        if (r.gpu, r.size, r.row_tokens, r.gpus) == (gpu, size, row_tokens, gpus)
    )
    assert 100 * row.mfu == pytest.approx(percent)
    assert row.tokens_per_second_per_gpu == speed


def test_no_measurement_stands_in_the_table_twice():
    keys = [(row.gpu, row.size, row.row_tokens, row.gpus) for row in measured()]
    assert len(keys) == len(set(keys)) > 100


def test_totals_of_the_example_files_are_those_in_the_table():
    expected = {"125m": 125_311_488, "1b": 1_315_950_592, "30b": 29_975_214_080}
    for size, total in expected.items():
        row = next(r for r in measured() if (r.size, r.row_tokens) == (size, 2048))
        assert plan.parameters(row.config)["total"] == total


@pytest.mark.parametrize(
    ("name", "gpu", "row_tokens", "gpus", "size", "row", "of"),
    [
        ("mpt-7b", "A100-40GB", 2048, 440, "7b", 2048, 128),  # more GPUs than were measured
        ("mpt-30b", "H100-80GB", 8192, 256, "30b", 8192, 8),  # the row before the GPUs
        ("mpt-350m", "H100-80GB", 2048, 8, "760m", 2048, 8),  # no 350m on this one
        ("mpt-7b", "A100-80GB", 50_000, 8, "7b", 65_536, 8),
        ("mpt-tiny", "A100-80GB", 256, 1, "125m", 1024, 8),
    ],
)
def test_the_nearest_is_chosen_by_size_then_row_then_gpus(
    name, gpu, row_tokens, gpus, size, row, of
):
    found = nearest(MPTConfig.named(name), gpu, row_tokens, gpus)
    assert (found.gpu, found.size, found.row_tokens, found.gpus) == (gpu, size, row, of)


def test_a_gpu_without_measurements_borrows_those_of_one_with_its_peak_or_has_none():
    seven = MPTConfig.named("mpt-7b")
    assert nearest(seven, "H200-141GB", 2048, 8).gpu == "H100-80GB"
    assert nearest(seven, "L4", 2048, 8) is None


def test_what_is_not_recomputed_is_gained_and_what_is_costs_a_third():
    row = Measured("A100-40GB", "7b", 2048, 8, 0.48, 12, 3679, recomputed=True)
    assert row.hfu == pytest.approx(0.64)
    assert expected_mfu(row, 1.0) == pytest.approx(0.48)
    assert expected_mfu(row, 0.0) == pytest.approx(0.64)
    assert expected_mfu(row, 0.5) == pytest.approx(0.64 / (1 + 1 / 6))


def test_the_hardware_is_as_busy_with_recomputation_as_without():
    # 7B in rows of 2,048 on eight A100: without, of the card with 80 GB; with, of that with 40.
    kept, again = (
        next(r for r in measured() if (r.gpu, r.size, r.row_tokens, r.gpus) == (gpu, "7b", 2048, 8))
        for gpu in ("A100-80GB", "A100-40GB")
    )
    assert (kept.recomputed, again.recomputed) == (False, True)
    assert again.hfu == pytest.approx(kept.hfu, rel=0.06)
    assert again.mfu < 0.8 * kept.mfu


# Model, GPU, GPUs, rows of a step, tokens of a row, tokens of the run, days: as announced, except
# that StoryWriter's batch of one row on each GPU is what 2,500 steps in about two days leave.
HEROES = {
    "mpt-7b": ("A100-40GB", 440, 1760, 2048, 1e12, 9.5),
    "mpt-7b-8k": ("H100-80GB", 256, 512, 8192, 500e9, 3.0),
    "mpt-7b-storywriter": ("A100-80GB", 8, 8, 65_536, 2500 * 8 * 65_536, 2.0),
}


def days_of(name):
    gpu, gpus, batch, row_tokens, tokens, announced = HEROES[name]
    setup = Setup(gpus, row_tokens)
    found = training(MPTConfig.named(name), setup, gpu, batch_rows=batch, tokens=tokens)
    return found["run"]["days"], announced


@pytest.mark.parametrize("name", ["mpt-7b-8k", "mpt-7b-storywriter"])
def test_days_are_the_announced_ones_within_15_percent(name):
    planned, announced = days_of(name)
    print(name, planned, announced)
    assert planned == pytest.approx(announced, rel=0.15)


def test_the_days_of_mpt_7b_have_pauses_in_them_that_no_plan_has():
    planned, announced = days_of("mpt-7b")
    # A quarter is missing: node failures, evaluation, checkpoints, older software, more GPUs.
    assert 0.70 < planned / announced < 0.85
