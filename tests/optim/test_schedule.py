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


def test_unknown_shapes_and_long_warm_ups_are_refused():
    with pytest.raises(ValueError, match="schedule is 'step'; it must be one of cosine"):
        schedule("step", 1.0, steps=10)
    with pytest.raises(ValueError, match="warmup is 10 steps of 10"):
        schedule("linear", 1.0, steps=10, warmup=10)
