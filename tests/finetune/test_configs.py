"""The released recipes of finetuning, as settings."""

from types import SimpleNamespace

import pytest

from mptbook import world
from mptbook.data.curriculum import Curriculum, Stage
from mptbook.finetune.sft import ConversationFeed, Finetune
from mptbook.model.config import MPTConfig
from mptbook.plan.costs import GPUS
from mptbook.plan.memory import Setup, shortage
from mptbook.settings import CONFIGS
from mptbook.tokenizer.chat import ChatTemplate

RELEASED = ["7b-instruct.toml", "7b-chat.toml", "30b-instruct.toml", "30b-chat.toml"]
OWN = ["tiny-instruct.toml", "tiny-chat.toml"]


def settings(name):
    return Finetune.from_toml(CONFIGS / name, out="run", **({"model": "a"} if name in OWN else {}))


@pytest.mark.parametrize("name", [*RELEASED, *OWN])
def test_a_recipe_has_a_template_a_rate_and_adamw(name):
    found = settings(name)
    ChatTemplate.load(found.template)
    found.optim.rates(1000)
    assert found.optim.name == "adamw"
    assert found.template == ("chatml" if "chat" in name else "instruct")
    assert found.mixture.keys() <= found.source.keys()


def test_mpt_7b_instruct_is_finetuned_as_llm_foundry_does():
    found = settings("7b-instruct.toml")
    assert (found.optim.lr, found.optim.betas) == (5e-6, (0.9, 0.999))
    assert (found.epochs, found.optim.warmup) == (2, 50)
    assert found.source == {"dolly-hhrlhf": "hf:mosaicml/dolly_hhrlhf"}


def test_mpt_30b_instruct_reads_72_rows_a_step_for_8_epochs():
    found = settings("30b-instruct.toml")
    assert found.batch_tokens == 72 * 8192
    assert (found.optim.lr, found.optim.betas, found.optim.weight_decay) == (
        9.65e-6,
        (0.9, 0.95),
        0,
    )
    assert (found.epochs, found.optim.warmup, found.optim.floor) == (8, 50, 0)
    assert found.source == {"instruct-v3": "hf:mosaicml/instruct-v3"}


def test_mpt_30b_chat_has_the_published_mix():
    mixture = settings("30b-chat.toml").mixture
    assert sum(mixture.values()) == pytest.approx(100 - 1.19, abs=0.02)
    camel = sum(weight for name, weight in mixture.items() if name.startswith("camel"))
    assert camel == pytest.approx(19.54)


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"),
    [
        ("7b-instruct.toml", 8, "A100-40GB"),
        ("7b-chat.toml", 8, "A100-80GB"),
        ("7b-chat.toml", 32, "A100-40GB"),
        ("30b-instruct.toml", 72, "A100-40GB"),
        ("30b-chat.toml", 64, "H100-80GB"),
    ],
)
def test_the_published_gpus_share_the_batches_and_hold_them(monkeypatch, name, gpus, gpu):
    found = settings(name)
    monkeypatch.setattr(world, "size", lambda: gpus)
    stage = Stage(
        tokens=found.batch_tokens, row_tokens=found.row_tokens, batch_tokens=found.batch_tokens
    )
    rows = SimpleNamespace(folder="rows", row_tokens=found.row_tokens, domains={})
    at_once = found.micro_batch_tokens
    feed = ConversationFeed(rows, Curriculum([stage]), seed=1, micro_batch_tokens=at_once)
    feed.check(0, 1)
    config = MPTConfig.named(found.model.removeprefix("mosaicml/"))
    how = found.optim.name, found.fsdp.precision, found.recompute
    setup = Setup(gpus, found.row_tokens, *how)
    assert shortage(config, setup, GPUS[gpu], at_once // found.row_tokens) < 0
