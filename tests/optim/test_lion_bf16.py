import copy
import math

import pytest
import torch

from mptbook.optim import lion
from mptbook.optim.lion import Lion, stochastic_round

UNIT = 2.0**-7  # between neighbours among the bfloat16 from 1 to 2


def weight_of(value, n=1, dtype=torch.bfloat16):
    return torch.nn.Parameter(torch.full((n,), value, dtype=dtype))


def descend(weight, steps, grad=1.0, **how):
    optimizer = Lion([weight], **how)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
    return optimizer


def run(weights, grads, **how):
    """Steps with falling rates; the optimizer."""
    optimizer = Lion(weights, lr=0.02, weight_decay=0.3, **how)
    for step, step_grads in enumerate(grads):
        for weight, grad in zip(weights, step_grads, strict=True):
            weight.grad = grad.to(weight.dtype)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / len(grads))
        optimizer.step()
    return optimizer


def starts_and_grads(steps=30):
    torch.manual_seed(0)
    shapes = [(5, 3), (37,)]
    starts = [torch.randn(shape).bfloat16() for shape in shapes]
    return starts, [[torch.randn(s).bfloat16() for s in shapes] for _ in range(steps)]


def test_nearest_loses_steps_below_half_a_unit_in_the_last_place():
    large, small = weight_of(1.5), weight_of(1.5)
    descend(large, 100, lr=0.51 * UNIT)
    descend(small, 100, lr=0.49 * UNIT)
    assert large.item() == 1.5 - 64 * UNIT - 36 * UNIT / 2  # whole units; below 1 they halve
    assert small.item() == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nearest_is_the_float32_step_rounded_once(dtype):
    starts, grads = starts_and_grads(steps=1)
    for start, grad in zip(starts, grads[0], strict=True):
        low, exact = (torch.nn.Parameter(start.to(d)) for d in (dtype, torch.float32))
        momentum = torch.randn(start.shape).to(dtype)
        for weight in (low, exact):
            optimizer = Lion([weight], lr=0.01, betas=(0.9, 0.999), weight_decay=0.5)
            optimizer.state[weight]["momentum"] = momentum.to(weight.dtype, copy=True)
            weight.grad = grad.to(weight.dtype)
            optimizer.step()
            momentum_after = optimizer.state[weight]["momentum"]
            if weight is low:
                kept = momentum_after
        assert torch.equal(low, exact.to(dtype))
        assert torch.equal(kept, momentum_after.to(dtype))


def test_stochastic_moves_by_lr_on_average():
    torch.manual_seed(0)
    n, steps, lr = 20_000, 40, 0.1 * UNIT
    weight = weight_of(1.5, n)
    descend(weight, steps, lr=lr, rounding="stochastic")
    moved = 1.5 - weight.double().mean().item()
    sigma = UNIT * math.sqrt(steps * 0.1 * 0.9 / n)  # each step is a whole unit in one of ten
    assert moved == pytest.approx(steps * lr, abs=5 * sigma)
    assert 5 * sigma < 0.02 * steps * lr
    assert weight.unique().numel() > 5


def test_stochastic_rounding_takes_a_neighbour_with_the_chance_that_makes_the_mean_right():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(20) * 10.0**n for n in range(-30, 31, 6)])
    draws = torch.stack([stochastic_round(x) for _ in range(4000)]).double()
    down = (x.view(torch.int32) & -(2**16)).view(torch.float32)  # towards zero
    up = ((x.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    assert ((draws == down) | (draws == up)).all()
    chance = ((x - down) / (up - down)).double()
    sigma = (chance * (1 - chance) / 4000).sqrt()
    assert (((draws == up).double().mean(0) - chance).abs() <= 5 * sigma).all()


def test_stochastic_rounding_leaves_alone_what_fits():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for _ in range(3):
        rounded = stochastic_round(every.float())
        torch.testing.assert_close(rounded, every, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_keeps_infinities_and_every_nan():
    bits = torch.tensor([0x7F800000, -0x00800000, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)
    for _ in range(20):  # the NaN of CUDA has all bits set: one more and it would be -0
        rounded = stochastic_round(bits.view(torch.float32)).tolist()
        assert rounded[:2] == [math.inf, -math.inf]
        assert all(map(math.isnan, rounded[2:]))


def test_stochastic_rounding_is_repeated_by_the_state_of_the_generator():
    starts, grads = starts_and_grads()
    ends = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        weights = [torch.nn.Parameter(start.clone()) for start in starts]
        run(weights, grads, rounding="stochastic")
        ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_momentum_of_a_constant_gradient_stalls_in_nearest_and_arrives_in_stochastic():
    torch.manual_seed(0)
    found = {}
    for rounding in lion.ROUNDINGS:
        weight = weight_of(0.0, 2000)
        optimizer = descend(weight, 1000, lr=0.0, betas=(0.9, 0.99), rounding=rounding)
        found[rounding] = optimizer.state[weight]["momentum"].double().mean().item()
    # A hundredth of the way that is left is below half a unit, 2 ** -9, once less than 0.195
    # is left.
    assert found["nearest"] == pytest.approx(1 - 100 * 2.0**-9, abs=2.0**-8)
    assert found["stochastic"] == pytest.approx(1, abs=0.005)
    assert found["master"] == pytest.approx(1, abs=1e-4)


def test_with_a_master_it_is_the_float32_run_rounded(monkeypatch):
    monkeypatch.setattr(lion, "CACHED", 16)
    starts, grads = starts_and_grads()
    low = [torch.nn.Parameter(start.clone()) for start in starts]
    exact = [torch.nn.Parameter(start.float()) for start in starts]
    optimizer, reference = run(low, grads, rounding="master"), run(exact, grads)
    for weight, wanted in zip(low, exact, strict=True):
        state = optimizer.state[weight]
        assert torch.equal(state["master"], wanted)
        assert torch.equal(state["momentum"], reference.state[wanted]["momentum"])
        assert torch.equal(weight, wanted.bfloat16())
        assert not torch.equal(weight.float(), wanted)


@pytest.mark.parametrize(
    ("rounding", "dtype", "n_bytes"),
    [
        ("nearest", torch.float32, 4),
        ("stochastic", torch.float32, 4),
        ("master", torch.float32, 4),
        ("nearest", torch.bfloat16, 2),
        ("stochastic", torch.bfloat16, 2),
        ("master", torch.bfloat16, 8),
        ("master", torch.float16, 8),
    ],
)
def test_bytes_of_state_a_weight(rounding, dtype, n_bytes):
    weight = weight_of(1.0, 24, dtype)
    state = descend(weight, 1, lr=0.1, rounding=rounding).state[weight]
    assert sum(value.numel() * value.itemsize for value in state.values()) == 24 * n_bytes


@pytest.mark.parametrize("rounding", lion.ROUNDINGS)
def test_weights_of_many_dtypes_share_a_group(rounding):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.bfloat16, torch.float32]
    weights = [weight_of(1.5, 5, dtype) for dtype in dtypes]
    optimizer = Lion(weights, lr=UNIT, betas=(0.5, 0.5), rounding=rounding)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, dtype in zip(weights, dtypes, strict=True):
        assert weight.dtype == dtype
        assert weight.eq(1.5 - UNIT).all()
        assert optimizer.state[weight]["momentum"].eq(0.5).all()


@pytest.mark.parametrize("rounding", lion.ROUNDINGS)
def test_a_loaded_state_keeps_its_dtype_and_goes_on_like_the_original(rounding):
    starts, grads = starts_and_grads(steps=6)
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    optimizer = run(weights, grads, rounding=rounding)
    others = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = Lion(others, rounding=rounding)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, other in zip(weights, others, strict=True):
        for name, value in optimizer.state[weight].items():
            assert resumed.state[other][name].dtype == value.dtype
    for optimizer_, tensors in ((optimizer, weights), (resumed, others)):
        torch.manual_seed(0)
        for step_grads in grads:
            for weight, grad in zip(tensors, step_grads, strict=True):
                weight.grad = grad
            optimizer_.step()
    for weight, other in zip(weights, others, strict=True):
        assert torch.equal(weight, other)


def test_stochastic_rounding_of_float16_is_refused():
    with pytest.raises(ValueError, match="a weight is float16; it must be bfloat16, or take"):
        Lion([weight_of(1.0, dtype=torch.float16)], rounding="stochastic")
