from pathlib import Path

import pytest
import torch

from mptbook.bench import racer
from mptbook.bench.peers import GPT2, LLAMA, MPT_PEER, OURS, PEERS, make_model, plain_steps
from mptbook.bench.racer import Entry, Racer, peer_optim, scheduled, start_racer
from mptbook.data.loader import Rows, batches, row_numbers
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.model.config import MPTConfig
from mptbook.train.loop import train_steps
from mptbook.train.optimizer import Optim, make_optimizer
from mptbook.train.pretrain import Pretrain

SHAPE = {"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320}
LR = 0.02


class Clock:
    """Time passes only when somebody looks, `tick` seconds each time."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)`: from now on a training step takes so many."""

    def set_to(seconds):
        made = Clock(seconds)  # a step looks when it begins and when it ends
        monkeypatch.setattr(racer, "perf_counter", made)
        return made

    return set_to


@pytest.fixture
def recipe(data):
    optim = Optim(lr=LR, schedule="trapezoid", warmup=3, floor=0.0, decay=0.5)
    return Pretrain(
        data=data, out=Path(), shape=SHAPE, steps=30, batch_tokens=64, optim=optim, device="cpu"
    )


def make(recipe, contestant=OURS, budget=10.0, characters=500):
    return Racer(Entry("any", contestant, LR, budget), recipe, characters)


def test_a_slice_ends_after_the_step_that_reaches_its_seconds_and_so_does_the_budget(clock, recipe):
    clock(2.0)
    runner = make(recipe, budget=13.0)
    states = [runner.train(5.0) for _ in range(3)]
    assert [state["seconds"] for state in states] == [6.0, 12.0, 14.0]
    assert [state["steps"] for state in states] == [3, 6, 7]
    assert [state["tokens"] for state in states] == [192, 384, 448]
    assert states[2]["loss"] < states[0]["loss"]
    assert states[2]["refused"] == 0


# By hand, in units of the peak, at 0, 1, ... of 10 seconds. mptbook's recipe here rises over 3 of
# its 30 steps and falls over the last half; a peer rises over 5 % of the time, then falls.
RATES = {
    OURS: [0.001, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
    LLAMA: [0.002, *((1 - tenth / 10) / 0.95 for tenth in range(1, 10))],
}


@pytest.mark.parametrize("contestant", RATES)
def test_the_learning_rate_follows_the_time_that_is_used_up(clock, recipe, contestant):
    clock(1.0)
    runner, found = make(recipe, contestant), []
    while runner.seconds < 10:
        runner.train(1.0)
        found.append(runner.optimizer.param_groups[0]["lr"] / LR)
    # A schedule has 10,000 steps, and its last one ends the fall, not the one after.
    assert found == pytest.approx(RATES[contestant], abs=3e-4)


def test_the_schedule_is_the_same_however_long_a_step_takes(clock, recipe):
    last = []
    for seconds in (0.5, 2.5):
        clock(seconds)
        runner = make(recipe)
        runner.train(7.5)
        runner.train(0.1)  # one step, that begins after 7.5 of 10 seconds
        last.append(runner.optimizer.param_groups[0]["lr"])
    assert last[0] == last[1] == pytest.approx(LR / 2, rel=1e-3)


def test_the_warm_up_is_the_same_part_of_the_time_as_of_the_recipes_steps(recipe):
    assert scheduled(recipe).warmup == 1000  # 3 of 30 steps are 1,000 of 10,000
    assert recipe.optim.warmup == 3


def test_every_contestant_sees_the_same_batches_in_the_same_order(clock, recipe, monkeypatch):
    clock(1.0)
    seen = []
    read = Rows.__getitem__
    monkeypatch.setattr(
        Rows, "__getitem__", lambda self, at: (seen.append(list(at)), read(self, at))[1]
    )
    domains = Rows(recipe.data).domains
    expected = [list(row_numbers(domains, 4, (recipe.seed,), step)) for step in range(3)]
    for contestant in (OURS, *PEERS):
        seen.clear()
        make(recipe, contestant).train(3.0)
        assert seen == expected, contestant


@pytest.mark.parametrize("contestant", [MPT_PEER, GPT2])
def test_the_plain_loop_takes_the_steps_of_train_steps(data, contestant):
    losses, weights = [], []
    for loop in (plain_steps, train_steps):
        torch.manual_seed(5)
        model = make_model(contestant, MPTConfig(**SHAPE, max_seq_len=16))
        model.eval()  # as a look leaves it
        optimizer = make_optimizer(model, peer_optim(1e-2))
        how = {"steps": 5} if loop is train_steps else {}
        stream = batches(Rows(data), 3, seed=1)
        logs = loop(model, stream, optimizer, lambda step: 1e-2 / (step + 1), clip=0.5, **how)
        taken = [next(logs) for _ in range(5)]
        assert model.training
        assert all(log.grad_norm > 0.5 for log in taken)  # so that it is clipped
        losses.append([log.loss for log in taken])
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize("contestant", PEERS)
def test_a_peer_is_trained_by_adamw_whose_matrices_decay(recipe, contestant):
    groups = make(recipe, contestant).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert all(group["betas"] == (0.9, 0.95) and group["fused"] for group in groups)
    assert all(group.get("lr_factor", 1) == 1 for group in groups)
    assert all(weight.dim() == 1 for weight in groups[2]["params"])


def test_contestants_of_one_kind_begin_with_the_same_weights(recipe):
    for contestant in (OURS, GPT2):
        first, second = (make(recipe, contestant, budget) for budget in (10.0, 4.0))
        pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert first.about() == {"parameters": sum(w.numel() for w in first.model.parameters())}


def test_a_look_costs_no_time_and_sums_the_domains(clock, recipe, monkeypatch):
    ticking = clock(1.0)
    runner = make(recipe)
    runner.heldout["front"] = domains = {"a": ["the hare ran"], "b": ["far away", "over the hill"]}

    def slow(*arguments, **how):
        ticking.now += 1000
        return perplexity(*arguments, **how)

    monkeypatch.setattr(racer, "perplexity", slow)
    runner.train(1.0)
    bits = runner.look("front")
    assert runner.train(1.0)["seconds"] == 2.0
    runner = make(recipe)
    clock(1.0)
    runner.train(1.0)
    found = [perplexity(runner.model, runner.tokenizer, texts) for texts in domains.values()]
    nats, n_bytes = sum(p.nats for p in found), sum(p.bytes for p in found)
    assert n_bytes == len("the hare ranfar awayover the hill")
    assert bits == pytest.approx(Prediction(nats, 1, n_bytes).bits_per_byte)


def test_the_front_is_cut_to_its_characters_and_all_is_not(recipe):
    texts = make(recipe, characters=500).heldout
    assert sum(map(len, texts["front"]["hares"])) == 500 < sum(map(len, texts["all"]["hares"]))


def test_what_diverged_is_none_and_no_error(clock, recipe):
    clock(1.0)
    runner = make(recipe, GPT2)
    with torch.no_grad():
        next(runner.model.parameters()).fill_(float("nan"))
    assert runner.train(2.0)["loss"] is None
    assert runner.look("front") is None


def test_only_mptbooks_process_keeps_freed_memory(recipe, monkeypatch):
    kept = []
    monkeypatch.setattr(racer, "keep_freed_memory", lambda: kept.append(True))
    for contestant, calls in ((GPT2, 0), (OURS, 1)):
        answer = start_racer(Entry("any", contestant, LR, 1.0), recipe, 500)
        assert answer("about")["parameters"] > 0
        assert len(kept) == calls
