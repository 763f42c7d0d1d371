import math

import pytest
import torch

from mptbook import plan
from mptbook.bench import steps
from mptbook.bench.peers import GPT2, LLAMA, MPT_PEER, OURS, PEERS, make_model
from mptbook.bench.steps import (
    Step,
    StepBench,
    contestant,
    figures,
    flops_per_token,
    losses,
    no_room,
    random_batches,
)
from mptbook.bench.workers import Worker
from mptbook.model.config import MPTConfig
from mptbook.train.loop import train_steps
from mptbook.train.optimizer import Optim, make_optimizer

CONFIG = MPTConfig(d_model=48, n_heads=3, n_layers=2, vocab_size=37, max_seq_len=17)
everyone = pytest.mark.parametrize("name", [OURS, *PEERS])


@pytest.fixture(autouse=True)
def _this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: True)


def made(name):
    torch.manual_seed(0)
    return make_model(name, CONFIG)


@everyone
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_moves_every_weight_and_tells_the_loss_before_it(name, precision):
    model = made(name)
    inputs, targets = next(random_batches(37, 2, 17))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model.loss(inputs, targets).item() / targets.numel()
    before = {path: weight.detach().clone() for path, weight in model.named_parameters()}
    assert next(losses(name, model, 2, precision)) == pytest.approx(loss, rel=1e-6)
    for path, weight in model.named_parameters():
        assert not torch.equal(weight, before[path]), path


def test_the_steps_of_mptbook_are_those_of_pretraining():
    ours, expected = made(OURS), made(OURS)
    taken = losses(OURS, ours, 2, "bf16")
    optim = Optim()
    logs = train_steps(
        expected,
        random_batches(37, 2, 17),
        make_optimizer(expected, optim),
        optim.rates(4800),
        steps=3,
        clip=optim.clip,
        precision="bf16",
    )
    assert [log.loss for log in logs] == [next(taken) for _ in range(3)]
    for one, other in zip(ours.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", PEERS)
def test_a_peers_steps_are_those_of_adamw_on_clipped_gradients(name):
    model, expected = made(name), made(name)
    taken, batches = losses(name, model, 2, "fp32"), random_batches(37, 2, 17)
    optimizer = torch.optim.AdamW(expected.parameters(), foreach=False)
    norms = []
    for _ in range(3):
        next(taken)
        inputs, targets = next(batches)
        (expected.loss(inputs, targets) / targets.numel()).backward()
        gradients = [weight.grad for weight in expected.parameters()]
        norms.append(sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5)
        for gradient in gradients:
            gradient.div_(max(norms[-1], 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert max(norms) > 1.05 * min(norms)  # AdamW forgets a factor that all gradients share
    assert max(norms) > 1
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_precision_changes_the_loss_of_everyone():
    for name in (OURS, *PEERS):
        low, full = (next(losses(name, made(name), 2, p)) for p in ("bf16", "fp32"))
        assert low != full
        assert low == pytest.approx(full, rel=0.02)


def test_random_ids_are_the_same_each_time_and_targets_follow_inputs():
    first, again = random_batches(37, 3, 17), random_batches(37, 3, 17)
    (x, y), (x_again, _) = next(first), next(again)
    assert x.shape == y.shape == (3, 17)
    assert torch.equal(x, x_again)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert not torch.equal(x, next(first)[0])


@pytest.mark.parametrize("name", [OURS, MPT_PEER])
def test_an_mpt_takes_six_flops_for_each_parameter(name):
    assert flops_per_token(name, CONFIG) == 6 * plan.parameters(CONFIG)["total"]


def test_flops_are_counted_without_making_weights():
    assert flops_per_token(OURS, MPTConfig.named("mpt-7b")) == 6 * 6_649_286_656


def test_positions_that_are_looked_up_take_no_flops():
    n = sum(weight.numel() for weight in made(GPT2).parameters())
    assert flops_per_token(GPT2, CONFIG) == 6 * (n - 17 * 48)
    assert flops_per_token(GPT2, CONFIG.replace(max_seq_len=999)) == flops_per_token(GPT2, CONFIG)


def test_the_default_models_have_13_8_million_parameters():
    config = StepBench().config(512)
    for name in (OURS, *PEERS):
        assert flops_per_token(name, config) / 6e6 == pytest.approx(13.8, abs=0.05)


def test_figures_are_those_counted_by_hand():
    taken = [Step(s, 3.6, b) for s, b in ((2.0, 600), (1.0, 700), (4.0, 800))]
    assert figures(taken, tokens=40) == {
        "seconds": [2.0, 1.0, 4.0],
        "median_seconds": 2.0,
        "noise": (3.0 - 1.5) / 2 / 2.0,  # quartiles half way between neighbours
        "tokens_per_second": 20.0,
        "added_bytes": 800,
        "bytes_per_token": 20.0,
    }
    assert figures(taken[:1], tokens=40)["noise"] is None


def test_a_contestant_says_what_a_step_took():
    step = contestant(LLAMA, CONFIG, 2, "fp32")
    first, second = step(), step()
    assert first.loss == pytest.approx(math.log(37), rel=0.3)
    assert first.loss != second.loss
    assert 0 < first.seconds < 60
    assert second.added_bytes >= first.added_bytes  # a peak


def test_what_does_not_fit_is_refused_in_its_process_and_known_as_such():
    config = CONFIG.replace(max_seq_len=4096)  # 200 MB of scores in each layer
    with (
        Worker("small", contestant, MPT_PEER, config, 1, "bf16", 0.3) as worker,
        pytest.raises(RuntimeError, match="you tried to allocate") as refused,
    ):
        worker.ask()
    assert no_room(refused.value)


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("a: std::bad_alloc", True),
        ("a: MemoryError", True),
        ("a: its process ended with exit code -9", True),  # by the system, for want of memory
        ("a: its process ended with exit code 1", False),
        ("a: TypeError: 'NoneType' object is not callable", False),
    ],
)
def test_other_failures_are_not_taken_for_want_of_memory(message, known):
    assert no_room(RuntimeError(message)) is known
