import json

import pytest

from mptbook.bench import curriculum
from mptbook.bench.curriculum import BOTH, LONG, MORE_CODE, SHORT, compare, stages
from mptbook.data.curriculum import Stage
from mptbook.data.prepare import Prepare, prepare
from mptbook.train.optimizer import Optim
from mptbook.train.pretrain import Pretrain


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """Rows of 16 tokens of two domains, `code` and `tales`."""
    folder = tmp_path_factory.mktemp("two")
    source = {}
    for name in ("code", "tales"):
        lines = [{"text": f"{name} {n} is {n * n}, and so on.\n"} for n in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source[name] = str(folder / f"{name}.jsonl")
    tokenizer = str(data / "tokenizer.json")
    prepare(Prepare(out=folder / "rows", tokenizer=tokenizer, row_tokens=16, source=source))
    return folder / "rows"


@pytest.fixture
def small(two):
    """A recipe with a model that trains in no time."""
    return Pretrain(
        data=two,
        out=two,
        shape={"d_model": 24, "n_heads": 3, "n_layers": 1, "vocab_size": 320},
        batch_tokens=128,
        stages=[
            Stage(tokens=800, row_tokens=16, mixture={"code": 1, "tales": 9}),
            Stage(tokens=200, row_tokens=128, mixture={"code": 1}),
        ],
        optim=Optim(lr=1e-3, warmup=2),
    )


def test_all_trainings_have_the_same_tokens_and_the_last_has_more_code(small):
    ways = stages(small, 50)
    assert set(ways) == {SHORT, LONG, BOTH, MORE_CODE}
    assert all(sum(part.tokens for part in parts) == 50 * 128 for parts in ways.values())
    lengths = {name: [part.row_tokens for part in parts] for name, parts in ways.items()}
    assert lengths == {SHORT: [16], LONG: [128], BOTH: [16, 128], MORE_CODE: [16, 128]}
    assert ways[BOTH][0].tokens == 40 * 128
    plain, code = {"code": 1, "tales": 9}, {"code": 1}
    mixtures = {name: [part.mixture for part in parts] for name, parts in ways.items()}
    assert mixtures == {
        SHORT: [plain],
        LONG: [plain],
        BOTH: [plain, plain],
        MORE_CODE: [plain, code],
    }


def test_every_training_is_read_at_both_lengths_before_and_after(two, small, monkeypatch):
    monkeypatch.setattr(curriculum, "recipe", lambda data: small)
    monkeypatch.setattr(curriculum, "keep_freed_memory", lambda: True)  # of this process
    trainings = compare(two, steps=10, seeds=2)["trainings"]
    for name, seeds in trainings.items():
        assert len(seeds) == 2
        for training in seeds:
            assert set(training["bits_per_byte"]) == {16, 128}
            assert set(training["bits_per_byte"][16]) == {"code", "tales"}
            assert ("before" in training) == (name in (BOTH, MORE_CODE))
    # Until the switch both staged trainings are one.
    assert trainings[BOTH][0]["before"] == trainings[MORE_CODE][0]["before"]
    assert trainings[BOTH][0]["bits_per_byte"] != trainings[MORE_CODE][0]["bits_per_byte"]
    assert trainings[BOTH][0]["before"] != trainings[BOTH][1]["before"]


def test_data_of_other_domains_is_refused(data):
    with pytest.raises(ValueError, match="has no domain code, novels, plays, wiki; it has hares"):
        compare(data)
