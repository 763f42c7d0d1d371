"""The settings files that the package brings along."""

import re
from types import SimpleNamespace

import pytest

from mptbook import world
from mptbook.data.mixture import Mixture
from mptbook.data.prepare import Prepare
from mptbook.model.config import MPTConfig
from mptbook.plan.costs import GPUS
from mptbook.plan.memory import Setup, shortage
from mptbook.settings import CONFIGS
from mptbook.train import feed
from mptbook.train.pretrain import Pretrain
from mptbook.train.run import _curriculum

SOURCES = "mpt-sources.toml"
RUNS = sorted(
    path.name
    for path in CONFIGS.glob("*.toml")  # of which some are finetunings, and some serve
    if path.name != SOURCES and not re.search("instruct|chat|serve", path.name)
)


def run(name, **changes):
    return Pretrain.from_toml(CONFIGS / name, data="rows", out="run", **changes)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_a_shape_and_a_schedule(name):
    settings = run(name)
    MPTConfig.named(settings.model).replace(**settings.shape)
    settings.optim.rates(settings.steps)


def test_mpt_7b_reads_a_trillion_tokens_of_ten_sources():
    settings = run("7b.toml")
    assert settings.steps * settings.batch_tokens == pytest.approx(1e12, rel=1e-5)
    assert settings.batch_tokens == 1760 * 2048
    assert sum(settings.mixture.values()) == pytest.approx(100)
    sources = Prepare.from_toml(CONFIGS / SOURCES, out="rows").source
    assert list(settings.mixture) == list(sources)
    assert Mixture(settings.mixture).window == 1000


def test_mpt_30b_reads_longer_rows_and_more_code_at_the_end():
    settings = run("30b.toml")
    first, second = settings.stages
    assert (first.row_tokens, second.row_tokens) == (2048, 8192)
    assert second.batch_tokens == 512 * 8192
    assert first.tokens == pytest.approx(1e12, rel=1e-5)
    assert second.tokens == pytest.approx(50e9, rel=1e-5)
    assert list(first.mixture) == list(run("7b.toml").mixture)
    for stage in settings.stages:
        assert sum(stage.mixture.values()) == pytest.approx(100)
    code = "stack", "stack-markdown"
    for name, weight in first.mixture.items():
        kept = 2.5 if name in code else (100 - 2.5 * 14.5) / (100 - 14.5)
        assert second.mixture[name] == pytest.approx(kept * weight, abs=0.006), name
    steps = first.tokens // settings.batch_tokens + second.tokens // second.batch_tokens
    assert steps == settings.steps


def test_storywriter_ends_with_the_released_shape():
    settings = run("storywriter-65k.toml")
    released = MPTConfig.named("mpt-7b-storywriter")
    (stage,) = settings.stages
    changes = {"max_seq_len": stage.row_tokens} | settings.shape
    assert MPTConfig.named(settings.model).replace(**changes) == released
    assert stage.tokens == settings.steps * settings.batch_tokens
    assert settings.micro_batch_tokens == stage.row_tokens == 65_536


def test_the_small_curriculum_differs_from_the_small_run_by_its_stages_alone():
    small, staged = run("tiny.toml"), run("tiny-curriculum.toml")
    assert staged.optim == small.optim
    assert staged.shape == small.shape
    first, second = staged.stages
    assert first.tokens + second.tokens == staged.steps * staged.batch_tokens
    assert second.mixture["code"] == pytest.approx(2.5 * first.mixture["code"])


@pytest.fixture
def feed_of(monkeypatch):
    """`feed_of(settings, processes)`: the batches as one of so many processes gets them."""
    sources = list(run("7b.toml").mixture)
    monkeypatch.setattr(
        feed, "Rows", lambda data, n: SimpleNamespace(folder=data, row_tokens=n, domains=sources)
    )

    def make(settings, processes):
        monkeypatch.setattr(world, "size", lambda: processes)
        curriculum = _curriculum(settings, 2048)
        at_once = settings.micro_batch_tokens
        return feed.Feed(settings.data, curriculum, seed=1, micro_batch_tokens=at_once)

    return make


STEPS_OF_2K = 277_433
LARGE = [  # settings, changes, number of the stage, GPUs, which, micro-batches of a step
    ("7b.toml", {}, 0, 440, "A100-40GB", 1),
    ("7b.toml", {}, 0, 88, "A100-40GB", 5),
    ("7b.toml", {}, 0, 40, "A100-40GB", 11),
    ("7b.toml", {}, 0, 8, "A100-40GB", 55),
    ("30b.toml", {"until": STEPS_OF_2K}, 0, 440, "A100-40GB", 1),
    ("30b.toml", {"micro_batch_tokens": 16_384}, 1, 256, "H100-80GB", 1),
    ("30b.toml", {}, 1, 256, "H100-80GB", 2),
    ("30b.toml", {}, 0, 8, "A100-80GB", 55),
    ("30b.toml", {}, 1, 8, "A100-80GB", 64),
    ("storywriter-65k.toml", {}, 0, 8, "A100-80GB", 1),
]


@pytest.mark.parametrize(("name", "changes", "number", "gpus", "gpu", "micro_batches"), LARGE)
def test_the_published_gpus_share_the_batches_and_hold_them(
    feed_of, name, changes, number, gpus, gpu, micro_batches
):
    settings = run(name, **changes)
    found = feed_of(settings, gpus)
    first = found.curriculum.starts[number]
    found.check(first, settings.end)
    assert found.accumulate(number) == micro_batches
    stage = found.curriculum.stages[number]
    rows, rest = divmod(settings.micro_batch_tokens, stage.row_tokens)
    assert micro_batches * rows * gpus * stage.row_tokens == stage.batch_tokens
    assert not rest
    config = MPTConfig.named(settings.model).replace(**settings.shape)
    how = settings.optim.name, settings.fsdp.precision, settings.recompute
    assert shortage(config, Setup(gpus, stage.row_tokens, *how), GPUS[gpu], rows) < 0


@pytest.mark.parametrize("gpus", [2**n for n in range(3, 10)])
def test_powers_of_two_share_what_the_comments_say(feed_of, gpus):
    small = run("7b.toml", batch_tokens=4_194_304, steps=238_419)
    assert small.steps * small.batch_tokens == pytest.approx(1e12, rel=1e-5)
    staged = run("30b.toml", batch_tokens=4_194_304, steps=250_340)
    staged.stages[0].tokens = 1_000_001_765_376
    feed_of(small, gpus).check(0, small.end)
    feed_of(staged, gpus).check(0, staged.end)


def test_the_stages_of_mpt_30b_are_for_different_numbers_of_gpus(feed_of):
    settings = run("30b.toml")
    assert feed_of(settings, 440).curriculum.starts == [0, STEPS_OF_2K]
    for gpus, first, end in ((440, 0, STEPS_OF_2K), (256, STEPS_OF_2K, settings.steps)):
        found = feed_of(settings, gpus)
        found.check(first, end)
        with pytest.raises(ValueError, match=f"which {gpus} processes cannot share"):
            found.check(0, settings.steps)
