import copy

import lion_pytorch
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mptbook.optim import lion
from mptbook.optim.groups import decay_groups
from mptbook.optim.lion import Lion

SHAPES = [(5, 3), (7,), (2, 2, 3), (31, 3)]


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def take_steps(optimizers, lrs, seed=0):
    """The same gradients for all; each step's lr is set as training loops set it."""
    generator = torch.Generator().manual_seed(seed)
    for lr in lrs:
        for group in zip(
            *(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True
        ):
            grad = torch.randn(group[0].shape, generator=generator)
            for weight in group:
                weight.grad = grad.to(weight.dtype)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()


def falling(lr, steps):
    return [lr * (1 - step / steps) for step in range(steps)]


def test_every_weight_moves_by_lr_whatever_its_gradient():
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1e-6, -1.0, 1e6])
    Lion([weight], lr=0.01).step()
    torch.testing.assert_close(weight.data, torch.tensor([-0.01, 0.01, -0.01]))


def test_two_steps_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weight.grad = torch.tensor([2.0])
    optimizer.step()  # decay: 1 - 0.1 * 0.5 = 0.95; direction +1; momentum 0.02
    torch.testing.assert_close(weight.data, torch.tensor([0.85]))
    weight.grad = torch.tensor([-0.1])
    optimizer.step()  # 0.9 * 0.02 - 0.1 * 0.1 = 0.008, still positive: momentum wins
    torch.testing.assert_close(weight.data, torch.tensor([0.85 * 0.95 - 0.1]))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5), (0.999, 0.0)])
def test_equal_to_lion_pytorch_bit_for_bit(betas, decay, decoupled, monkeypatch):
    monkeypatch.setattr(lion, "CACHED", 11)  # so that tensors are cut and gathered
    ours, theirs = parameters(), parameters()
    how = {"lr": 3e-3, "betas": betas, "weight_decay": decay}
    a = Lion(ours, **how, decoupled=decoupled)
    b = lion_pytorch.Lion(theirs, **how, decoupled_weight_decay=decoupled)
    take_steps([a, b], falling(3e-3, 60))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(a.state[x]["momentum"], b.state[y]["exp_avg"])


def test_decoupled_decay_by_hand():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.tensor([1.0])
    optimizer = Lion([weight], lr=0.1, weight_decay=0.25, decoupled=True)
    optimizer.step()  # at the first lr all of the decay: 2 * 0.75, then 0.1 down
    torch.testing.assert_close(weight.data, torch.tensor([1.4]))
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()  # at half of it half of the decay: 1.4 * 0.875
    torch.testing.assert_close(weight.data, torch.tensor([1.4 * 0.875 - 0.05]))


def test_decoupled_decay_is_coupled_decay_in_units_of_the_first_lr():
    ours, theirs = parameters(), parameters()
    a = Lion(ours, lr=0.02, weight_decay=0.01, decoupled=True)
    b = Lion(theirs, lr=0.02, weight_decay=0.01 / 0.02)
    take_steps([a, b], falling(0.02, 9))
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_a_scheduler_of_pytorch_and_a_checkpoint_keep_the_first_lr():
    optimizer = Lion(parameters(), lr=0.5, weight_decay=0.1, decoupled=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    resumed = Lion(parameters(), lr=optimizer.param_groups[0]["lr"], decoupled=True)
    resumed.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups + resumed.param_groups:
        assert group["initial_lr"] == 0.5
    assert scheduler.base_lrs == [0.5]


def test_where_tensors_are_cut_changes_nothing(monkeypatch):
    whole, cut = parameters(), parameters()
    take_steps([Lion(whole, lr=0.01, weight_decay=0.1)], falling(0.01, 5))
    monkeypatch.setattr(lion, "CACHED", 4)
    take_steps([Lion(cut, lr=0.01, weight_decay=0.1)], falling(0.01, 5))
    for x, y in zip(whole, cut, strict=True):
        assert torch.equal(x, y)


def test_a_batch_is_no_longer_than_told_and_no_number_is_lost(monkeypatch):
    monkeypatch.setattr(lion, "CACHED", 10)
    numbers = torch.arange(130)
    weights = list(numbers.split([15, 7, 3, 1, 31, 9, 64]))
    batches = list(lion._batches([[weights, weights]]))
    sizes = [sum(block.numel() for block in blocks) for blocks, _ in batches]
    assert max(sizes) == 10
    assert len(sizes) < 20  # short tensors share a batch
    assert torch.equal(torch.cat([block for blocks, _ in batches for block in blocks]), numbers)


@pytest.mark.parametrize("rounding", lion.ROUNDINGS)
def test_a_transposed_weight_moves_like_a_plain_one(rounding, monkeypatch):
    monkeypatch.setattr(lion, "CACHED", 4)
    plain = torch.nn.Parameter(torch.arange(1.0, 16).reshape(5, 3).bfloat16())
    transposed = torch.nn.Parameter(plain.detach().T.contiguous().T)
    assert not transposed.is_contiguous()
    for weight in (plain, transposed):
        torch.manual_seed(0)
        take_steps([Lion([weight], lr=0.5, rounding=rounding)], falling(0.5, 4))
    assert torch.equal(plain, transposed)


def test_a_weight_without_a_gradient_stays():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    used.grad = torch.ones(2)
    optimizer = Lion([used, unused], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert unused.tolist() == [1, 1]
    assert unused not in optimizer.state


def test_its_state_is_one_number_a_weight():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3)
    optimizer = Lion([weight])
    optimizer.step()
    state = optimizer.state[weight].values()
    assert sum(value.numel() for value in state) == 12


def test_a_closure_is_evaluated_with_gradients():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([weight], lr=0.5)

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert weight.item() == 1.5


def test_a_step_at_rate_zero_changes_no_weight():
    # How torch.distributed.checkpoint makes state before it loads one.
    for decoupled in (False, True):
        weights = parameters()
        optimizer = Lion(weights, lr=0.1, weight_decay=0.5, decoupled=decoupled)
        take_steps([optimizer], [0.0])
        for weight, start in zip(weights, parameters(), strict=True):
            assert torch.equal(weight, start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_hidden_and_kills_the_momentum_of_its_weight(bad):
    weight = torch.nn.Parameter(torch.ones(40))  # longer than a vector register
    optimizer = Lion([weight], lr=0.25)
    weight.grad = torch.ones(40)
    weight.grad[[0, 39]] = bad
    optimizer.step()
    moved = 0.25 if bad == float("inf") else 0.0  # the sign of NaN is 0
    assert weight.isfinite().all()
    assert weight[[0, 39]].tolist() == [1 - moved] * 2
    for _ in range(3):
        weight.grad = -torch.ones(40) * 100
        optimizer.step()
    assert weight[1:39].eq(1.5).all()  # one step down, three up
    assert weight[[0, 39]].tolist() == [1 - 4 * moved] * 2  # no gradient reaches it any more
    dead = optimizer.state[weight]["momentum"].isfinite().logical_not()
    assert dead.nonzero().flatten().tolist() == [0, 39]


def test_decay_goes_on_where_the_momentum_is_dead():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([float("nan")])
    Lion([weight], lr=0.5, weight_decay=0.5).step()
    assert weight.item() == 0.75


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1e-4}, "lr is -0.0001; it must be a finite number and not negative"),
        ({"lr": float("nan")}, "lr is nan; it must be a finite number"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0; it must be a finite number"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be a finite number"),
        ({"betas": (1.0, 0.99)}, r"b1 is 1.0; it must lie in \[0, 1\), such as 0.9"),
        ({"betas": (0.9, -0.1)}, "b2 is -0.1"),
        ({"betas": (float("nan"), 0.1)}, "b1 is nan"),
        ({"rounding": "up"}, "rounding is 'up'; it must be one of nearest, stochastic, master"),
        ({"lr": 0.0, "decoupled": True}, "lr is 0.0 and decoupled decay is in units of it"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Lion(parameters(), **wrong)
    with pytest.raises(ValueError, match=message):
        Lion([{"params": parameters()} | wrong])


def test_a_copy_and_a_loaded_state_go_on_like_the_original():
    weights, other = parameters(), parameters()
    optimizer = Lion(weights, lr=0.01, weight_decay=0.1, decoupled=True)
    take_steps([optimizer], falling(0.01, 5))
    copied = copy.deepcopy(optimizer)
    loaded = Lion(other, lr=0.7)
    for weight, trained in zip(other, weights, strict=True):
        weight.data.copy_(trained.data)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps([optimizer, copied, loaded], falling(0.01, 5), seed=1)
    for one, *others in zip(
        *(o.param_groups[0]["params"] for o in (optimizer, copied, loaded)), strict=True
    ):
        assert all(torch.equal(one, other) for other in others)


def compiled_and_eager(backend, lrs, **how):
    """Frames compiled; the weights of a compiled run and of an eager one."""
    torch._dynamo.reset()
    ours, theirs = parameters(), parameters()
    a, b = Lion(ours, lr=torch.tensor(0.01), **how), Lion(theirs, lr=0.01, **how)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(a.step, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for lr in lrs:
        a.param_groups[0]["lr"].fill_(lr)
        b.param_groups[0]["lr"] = lr
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        step()
        b.step()
    return counter.frame_count, ours, theirs


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_compiled_step_is_one_graph_for_all_rates_and_the_same_step(decoupled):
    lrs = [0.01, 0.03, 0.02, 0.005, 0.001]
    how = {"weight_decay": 0.1, "decoupled": decoupled}
    frames, ours, theirs = compiled_and_eager("aot_eager", lrs, **how)
    assert frames == 1
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # 1 - lr * decay in float32


@pytest.mark.slow
def test_a_step_compiled_by_inductor_is_the_same_step():
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    frames, ours, theirs = compiled_and_eager("inductor", falling(0.01, 20), weight_decay=0.1)
    assert frames == 1
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # rounds once more than eager


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    matrices, vectors = decay_groups(model, 0.1)
    assert [p.dim() for p in matrices["params"]] == [2]
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
