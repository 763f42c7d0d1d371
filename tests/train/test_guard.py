"""When a step is refused, when the run goes back, and which batches it leaves out."""

import math

import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from mptbook.data.loader import place
from mptbook.optim.lion import Lion
from mptbook.train.guard import Diverged, Guard, GuardSettings
from mptbook.train.loop import train_steps


def guard_after(losses, **settings):
    guard = Guard(GuardSettings(**{"window": 4, "patience": 2, "lead": 1} | settings))
    for loss in losses:
        assert guard.judge(loss, 1.0) == ""
    return guard


def test_a_loss_is_measured_in_standard_deviations_of_the_window():
    # 1, 3, 1, 3: mean 2, standard deviation 1
    assert guard_after([1, 3, 1, 3]).judge(7.9, 1.0) == ""
    reason = guard_after([1, 3, 1, 3]).judge(8.1, 1.0)
    assert reason == "the loss 8.100 is 6.1 standard deviations above 2.000"
    assert guard_after([9, 9, 1, 3, 1, 3]).judge(8.1, 1.0) == reason  # older ones are forgotten


def test_nothing_is_out_of_line_before_the_window_is_full():
    assert guard_after([1, 1, 1]).judge(1000.0, 1.0) == ""


def test_a_low_loss_is_never_refused():
    assert guard_after([1, 3, 1, 3]).judge(0.0, 1.0) == ""


def test_a_refused_loss_does_not_widen_the_measure():
    guard = guard_after([1, 3, 1, 3])
    for _ in range(3):
        assert guard.judge(50.0, 1.0)
    assert "above 2.000" in guard.judge(50.0, 1.0)


def test_losses_that_hardly_move_are_not_judged_on_their_last_digits():
    assert guard_after([2.0] * 4).judge(2.1, 1.0) == ""
    assert guard_after([2.0] * 4).judge(2.13, 1.0) != ""  # 6 times 1 % of the mean is 0.12


def test_a_loss_of_zero_is_given_a_hundredth_of_a_nat():
    # A few sentences learned by heart have no loss at all in float32.
    guard = guard_after([0.0] * 4)
    assert guard.deviations(0.03) == pytest.approx(3)
    assert guard.judge(0.0, 0.0) == ""


def test_a_straight_climb_is_never_refused_however_steep():
    # A ramp's end lies sqrt(3) of its own deviations above its mean.
    guard = Guard(GuardSettings(window=50))
    for loss in range(2, 200):
        assert guard.deviations(loss) < 2 * math.sqrt(3)
        assert guard.judge(loss, 1.0) == ""


def test_an_infinite_threshold_refuses_no_finite_loss():
    assert guard_after([1, 3, 1, 3], threshold=math.inf).judge(1e30, 1.0) == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_even_without_settings(value):
    assert Guard().judge(value, 1.0) == f"the loss is {value}"
    assert Guard().judge(1.0, value) == f"the norm of the gradient is {value}"


def test_without_settings_the_run_is_never_asked_to_go_back():
    guard = Guard()
    for _ in range(50):
        guard.judge(math.nan, 1.0)
    assert not guard.must_go_back


def test_refused_steps_count_only_in_a_row():
    guard = guard_after([1, 3, 1, 3])
    guard.judge(math.nan, 1.0)
    guard.judge(2.0, 1.0)
    guard.judge(math.nan, 1.0)
    assert not guard.must_go_back
    guard.judge(math.nan, 1.0)
    assert guard.must_go_back


def test_the_suspect_steps_are_the_refused_ones_and_their_lead():
    guard = guard_after([1, 3, 1, 3], lead=3)
    guard.judge(math.nan, 1.0)
    guard.judge(math.nan, 1.0)
    assert guard.first_suspect(20) == 16  # 19 and 20 refused, 16 to 18 before them
    assert guard.first_suspect(3) == 1
    assert guard.go_back(20) == [15, 16, 17, 18, 19]  # places count from 0


def test_a_second_rollback_reaches_over_what_the_first_left_out():
    guard = guard_after([1, 3, 1, 3], lead=2, patience=1)
    guard.judge(math.nan, 1.0)
    assert guard.go_back(10) == [7, 8, 9]
    guard.refused = 1
    # Steps 7, 8 and 9 had the places after those that are left out, but for step 7: 6
    assert guard.go_back(9) == [6, 10, 11]
    assert guard.skipped == [6, 7, 8, 9, 10, 11]


def test_the_number_of_rollbacks_is_bounded():
    guard = guard_after([1, 3, 1, 3], rollbacks=1, patience=1)
    guard.judge(math.nan, 1.0)
    guard.go_back(10)
    with pytest.raises(Diverged, match=r"after going back 1 times.*batches of steps 9 to 10"):
        guard.go_back(10)


@given(st.sets(st.integers(0, 30)))
def test_the_batches_that_are_left_out_are_these_and_no_others(skipped):
    skipped = sorted(skipped)
    seen = [place(step, skipped) for step in range(40)]
    assert seen == [at for at in range(100) if at not in skipped][:40]


@given(st.lists(st.floats(0, 20), max_size=12), st.integers(0, 11))
def test_a_restored_guard_judges_like_the_one_that_was_saved(losses, cut):
    settings = GuardSettings(window=3, patience=2)
    whole, first, second = (Guard(settings) for _ in range(3))
    expected = [whole.judge(loss, 1.0) for loss in losses]
    found = [first.judge(loss, 1.0) for loss in losses[:cut]]
    second.load_state_dict(first.state_dict())
    found += [second.judge(loss, 1.0) for loss in losses[cut:]]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 1}, "greater than or equal to 2"),
        ({"threshold": 0}, "greater than 0"),
        ({"patience": 0}, "greater than"),
        ({"rollback": 1}, "not permitted"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GuardSettings(**wrong)


def _judge_in_a_process(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    guard = Guard(GuardSettings(window=2, patience=2))
    norms = [1.0, math.nan if rank == 1 else 1.0, 1.0]
    results[rank] = [guard.judge(2.0, norm) for norm in norms] + [guard.refused]
    torch.distributed.destroy_process_group()


def test_processes_agree_on_what_one_of_them_refuses(tmp_path):
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        store = f"file://{tmp_path / 'store'}"
        multiprocessing.spawn(_judge_in_a_process, args=(store, results), nprocs=2)
        assert results[0] == ["", "another process refused it", "", 0]
        assert results[1] == ["", "the norm of the gradient is nan", "", 0]


def train_with_one_nan(guarded):
    """Weights and momentum of two bigram tables after 8 steps, one gradient NaN in step 3."""
    torch.manual_seed(0)
    model = torch.nn.Embedding(5, 5)
    optimizer = Lion(model.parameters(), lr=0.01)
    batch = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]])
    calls = []

    def spoil(grad):
        calls.append(1)
        return grad.index_fill(0, torch.tensor(1), math.nan) if len(calls) == 3 else grad

    model.weight.register_hook(spoil)
    if guarded:
        logs = list(train_steps(model, iter([batch] * 8), optimizer, lambda _: 0.01, steps=8))
        assert [bool(log.refused) for log in logs] == [n == 2 for n in range(8)]
    else:
        for x, y in [batch] * 8:
            torch.nn.functional.cross_entropy(model(x)[0], y[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.weight.detach(), next(iter(optimizer.state[model.weight].values()))


def test_lion_hides_a_gradient_that_is_nan_and_the_loop_does_not_let_it_in():
    weight, momentum = train_with_one_nan(guarded=False)
    assert momentum[1].isnan().all()  # for good: five sound steps came after it
    assert momentum[0].isfinite().all()
    weight, momentum = train_with_one_nan(guarded=True)
    assert weight.isfinite().all()
    assert momentum.isfinite().all()
