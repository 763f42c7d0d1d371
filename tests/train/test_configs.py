"""The settings files that the package brings along."""

import pytest

from mptbook.data.mixture import Mixture
from mptbook.data.prepare import Prepare
from mptbook.model.config import MPTConfig
from mptbook.settings import CONFIGS
from mptbook.train.pretrain import Pretrain

SOURCES = "mpt-sources.toml"
RUNS = sorted(path.name for path in CONFIGS.glob("*.toml") if path.name != SOURCES)


def run(name):
    return Pretrain.from_toml(CONFIGS / name, data="rows", out="run")


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
