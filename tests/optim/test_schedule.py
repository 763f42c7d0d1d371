import math

import pytest

from mptbook.optim.schedule import SHAPES, schedule


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_rises_in_equal_steps_to_the_peak(shape):
    rate = schedule(shape, 0.5, steps=100, warmup=10)
    assert [rate(step) for step in range(10)] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert max(map(rate, range(100))) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "trapezoid"])
def test_the_last_step_has_the_floor_and_no_step_goes_below(shape):
    rates = list(map(schedule(shape, 2.0, steps=57, warmup=5, floor=0.1), range(57)))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_cosine_is_half_way_down_at_half_time():
    rate = schedule("cosine", 1.0, steps=101, warmup=0, floor=0.2)
    assert rate(50) == pytest.approx(0.6)
    assert rate(25) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_inverse_square_root_halves_when_the_step_is_four_times_the_warm_up():
    rate = schedule("inverse_sqrt", 1.0, steps=1000, warmup=25)
    assert rate(100) == pytest.approx(0.5)


def test_a_trapezoid_is_flat_until_its_decay():
    rate = schedule("trapezoid", 1.0, steps=100, warmup=10, decay=0.25)
    assert {rate(step) for step in range(9, 75)} == {1.0}
    assert rate(87) == pytest.approx(0.5)


@pytest.mark.parametrize("decay", [0.01, 0.05, 0.1, 1.0])
def test_even_the_shortest_fall_of_a_trapezoid_reaches_the_floor(decay):
    rate = schedule("trapezoid", 1.0, steps=10, floor=0.1, decay=decay)
    assert rate(9) == pytest.approx(0.1)
    assert rate(0) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_one_step_takes_it_at_the_peak(shape):
    assert schedule(shape, 0.5, steps=1)(0) == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": float("nan")}, "lr is nan; it must be a finite number"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"lr": -0.1}, "lr is -0.1; it must be a finite number and not negative"),
        ({"steps": 0}, "steps is 0; a run has at least 1"),
        ({"steps": -5}, "steps is -5"),
        ({"warmup": -1}, "warmup is -1 steps of 10; it must be shorter than the run and not neg"),
        ({"floor": 1.5}, r"floor is 1.5; it is a part of lr and must lie in \[0, 1\]"),
        ({"decay": 0.0}, r"decay is 0.0; it is a part of the run and must lie in \(0, 1\]"),
    ],
)
def test_numbers_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        schedule("trapezoid", **({"lr": 1.0, "steps": 10} | wrong))


def test_unknown_shapes_and_long_warm_ups_are_refused():
    with pytest.raises(ValueError, match="schedule is 'step'; it must be one of cosine"):
        schedule("step", 1.0, steps=10)
    with pytest.raises(ValueError, match="warmup is 10 steps of 10"):
        schedule("linear", 1.0, steps=10, warmup=10)
