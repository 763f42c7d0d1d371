import lion_pytorch
import pytest
import torch

from mptbook.optim.groups import decay_groups
from mptbook.optim.lion import Lion


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


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)])
def test_equal_to_lion_pytorch(betas, decay):
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2, 3)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    a = Lion(ours, lr=3e-3, betas=betas, weight_decay=decay)
    b = lion_pytorch.Lion(theirs, lr=3e-3, betas=betas, weight_decay=decay)
    for _ in range(50):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1e-4}, "lr is -0.0001; it must not be negative"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (1.0, 0.99)}, r"b1 is 1.0; it must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, "b2 is -0.1"),
    ],
)
def test_settings_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Lion([torch.nn.Parameter(torch.zeros(1))], **wrong)


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    matrices, vectors = decay_groups(model, 0.1)
    assert [p.dim() for p in matrices["params"]] == [2]
    assert [p.dim() for p in vectors["params"]] == [1, 1, 1]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
