import json
import math

import pytest

from mptbook.__main__ import main
from mptbook.bench.clients import ask, new_prompts, serving, write_random, written
from mptbook.bench.serve import most_ratio, plot, summary
from mptbook.model.config import MPTConfig
from mptbook.tokenizer.bpe import train_bpe

TINY = {"d_model": 64, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 300}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sat on the mat — olé\n"] * 5, 290)


@pytest.fixture(scope="module")
def port(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "m"
    write_random(MPTConfig(**TINY), tokenizer, folder)
    with serving(folder, slots=3, tokens=400) as found:
        yield found


def test_every_answer_is_as_long_as_it_may_be_and_times_its_tokens(port, tokenizer):
    new_prompt = new_prompts(len(tokenizer))
    for n in (1, 9, 30):
        answer = ask(port, new_prompt(n), 50)
        assert answer.sent < answer.came[0]
        assert answer.came == sorted(answer.came)
        whole = answer.first + 49 * answer.between
        assert whole == pytest.approx(answer.came[-1] - answer.sent)


def test_others_are_written_until_the_end_and_then_given_up(port, tokenizer):
    new_prompt = new_prompts(len(tokenizer))
    with written(port, [new_prompt(5)], 390):
        ask(port, new_prompt(5), 3)
    with (
        pytest.raises(RuntimeError, match="2 tokens were written before others had been"),
        written(port, [new_prompt(5)], 2),
    ):
        ask(port, new_prompt(5), 30)


def test_a_refused_request_says_why(port):
    with pytest.raises(RuntimeError, match=r"refused: .*the model has room for 400"):
        ask(port, [1, 2, 3], 399)
    with (
        pytest.raises(RuntimeError, match=r"refused: .*the model has room for 400"),
        written(port, [[1, 2, 3]], 399),
    ):
        pass


def test_no_two_prompts_begin_alike(tokenizer):
    new_prompt = new_prompts(len(tokenizer))
    prompts = [new_prompt(n) for n in range(1, 200)]
    assert [len(prompt) for prompt in prompts] == [*range(1, 200)]
    assert len({prompt[0] for prompt in prompts}) == 199


def test_ratios_are_taken_within_a_round():
    first = {f"{way}_{what}": 1.0 for way in ("alone", "at_once", "joining")
             for what in ("speed", "first", "worst", "between")}  # fmt: skip
    slow = {name: 10 * value for name, value in first.items()}  # the machine, for a while
    found = summary([first | {"at_once_speed": 3.0}, slow | {"at_once_speed": 30.0}])
    assert found["speed_ratio"] == 3
    assert found["speed_ratio_noise"] == 0
    assert found["at_once_speed"] == 16.5


def test_what_could_be_gained_at_most_is_what_memory_and_products_leave():
    config = MPTConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=16)  # layers 768, head 128
    # Nothing but memory, which reads for all at the same time; and nothing but products.
    assert most_ratio(config, 8, 5, 9, 1.0, math.inf) == pytest.approx(8)
    # Never more than so many times, also where the quotient of two floats would be.
    assert all(most_ratio(config, 3, 4, 12, speed, math.inf) <= 3 for speed in range(1, 1000))
    assert most_ratio(config, 8, 5, 9, math.inf, 1.0) == pytest.approx(1)
    # Reading 5 tokens takes 5 * 768 + 128 products, a second each, or 2 * 896 bytes; a token of
    # one takes the bytes, and one of each of 8 the products.
    alone = 5 * 768 + 128 + 3 * 2 * 896
    expected = 8 * alone / (8 * (5 * 768 + 128) + 3 * 8 * 896)
    assert most_ratio(config, 8, 5, 4, 1.0, 1.0) == pytest.approx(expected)


def test_the_command_measures_draws_and_writes(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(MPTConfig, "named", staticmethod(lambda name: MPTConfig(**TINY)))
    tokenizer.save(tmp_path / "tokenizer.json")
    out, figure = tmp_path / "found.json", tmp_path / "found.svg"
    how = ["--bits", "[16, 8]", "--repeats", "2", "--new-tokens", "12", "--prompt-tokens", "[4, 9]"]
    how += ["--requests", "3", "--slots", "3", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["bench", "serve", *how, "--out", str(out), "--figure", str(figure)]) == 0
    record = json.loads(out.read_text())
    assert record["bytes_per_second"] > 1e8
    assert record["products_per_second"] > 1e8
    found = record["servers"]
    assert list(found) == ["16 bits", "8 bits"]
    assert 1 <= found["16 bits"]["4"]["most_ratio"] <= 3
    assert list(found["8 bits"]) == ["4", "9"]
    for each in found["8 bits"].values():
        # A token takes its time between two, and the first token longer.
        assert 0 < each["alone_speed"] < 1 / each["alone_between"]
        assert 0 < each["at_once_first"] <= each["at_once_worst"]
        assert each["joining_first"] <= each["joining_worst"]
        assert 0 < each["client"] < 1
        assert each["speed_ratio"] > 0
    shown = capsys.readouterr().out
    assert "8 bits, prompts of 4, at once" in shown
    assert shown.count("x if nothing were lost") == 2  # of the two prompts, in 16 bits
    assert figure.read_text().startswith("<?xml")
    assert [len(axes.patches) for axes in plot(found).axes] == [8, 12]


def test_more_requests_than_slots_are_refused(capsys):
    assert main(["bench", "serve", "--slots", "7"]) == 2
    assert "8 requests at once, but 7 slots" in capsys.readouterr().err
