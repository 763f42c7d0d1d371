import json

import pytest

from mptbook.__main__ import main
from mptbook.bench import generate, writers
from mptbook.bench.generate import MEMORY, PEERS, BenchGenerate, plot
from mptbook.bench.writers import llama_cpp_mpt, memory, ours, some_prompts
from mptbook.infer.engine import Engine
from mptbook.model.config import MPTConfig

TINY = {"d_model": 64, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 97}


def test_prompts_are_the_same_for_all_and_begin_differently():
    assert some_prompts(97, 8, 5) == some_prompts(97, 8, 5)
    assert len({prompt[0] for prompt in some_prompts(97, 8, 5)}) > 4


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_as_many_tokens_are_written_as_are_asked_for(bits, monkeypatch):
    streams = []

    class Kept(Engine):
        def submit(self, request):
            streams.append(super().submit(request))
            return streams[-1]

    monkeypatch.setattr(writers, "Engine", Kept)
    seconds = ours(MPTConfig(**TINY), bits)
    about = seconds()
    assert about["weight_bytes"] >= 64 * (97 + 12 * 64) * bits / 8
    for n_tokens in (1, 40):
        streams.clear()
        assert seconds(3, 5, n_tokens) > 0
        counts = [sum(len(piece.tokens) for piece in stream) for stream in streams]
        assert counts == [n_tokens] * 3


def test_llama_cpp_writes_as_many_tokens_to_as_many():
    seconds = llama_cpp_mpt(MPTConfig(**TINY | {"vocab_size": 300}), "q4_0")
    assert all(seconds(3, 5, n_tokens) > 0 for n_tokens in (1, 40))  # raises if it wrote fewer


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_that_is_not_installed_is_named_before_anything_is_measured(
    peer, monkeypatch, capsys
):
    monkeypatch.setattr(generate, "find_spec", lambda package: None)
    assert main(["bench", "generate", "--peers", f'["{peer}"]']) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {peer} is in the package {PEERS[peer][3]}, which is not here")
    assert said.count("\n") == 1


def test_memory_is_read_at_a_speed_that_memory_has():
    assert 1e8 < memory("")() < 1e13


def test_the_share_of_memory_is_taken_in_each_round():
    # Memory slows down after the first round, and the third token is slow: no round has more than
    # half but the second, though the medians of both would say 2.
    bench = BenchGenerate(sequences=[1], prompt_tokens=4, new_tokens=3, long_prompt=9)
    times = {MEMORY: [400, 100, 100], (9, 1, 1): [1, 1, 1], (4, 1, 1): [1, 1, 1]}
    times[4, 1, 3] = [1.2, 1.2, 1.8]
    found = bench._figures(times, weight_bytes=20)["1"]
    assert found["tokens_per_second"] == pytest.approx(10)
    assert found["share_of_memory"] == pytest.approx(0.5)


def test_the_command_measures_draws_and_writes(tmp_path, monkeypatch, capsys):
    sizes = {"d_model": 64, "n_heads": 2, "n_layers": 1, "vocab_size": 200}
    named = staticmethod(lambda name: MPTConfig(**sizes))
    monkeypatch.setattr(MPTConfig, "named", named)
    out, figure = tmp_path / "found.json", tmp_path / "found.svg"
    how = ["--bits", "[8]", "--peers", '["transformers"]', "--repeats", "2", "--new-tokens", "3"]
    how += ["--prompt-tokens", "4", "--long-prompt", "9", "--sequences", "[1, 2]"]
    assert main(["bench", "generate", *how, "--out", str(out), "--figure", str(figure)]) == 0
    found = json.loads(out.read_text())
    assert list(found["contestants"]) == ["mptbook, 8 bits", "transformers' MPT, bfloat16"]
    ours_, peer = found["contestants"].values()
    assert {"1", "2", "prompt", "weight_bytes", "peak_bytes", "seconds"} <= set(ours_)
    least, most = found["bytes_per_second_range"]
    assert 1e8 < least <= found["bytes_per_second"] <= most
    assert "share_of_memory" in ours_["1"]
    assert "share_of_memory" not in peer["1"]
    assert "memory is read at" in capsys.readouterr().out
    assert figure.read_text().startswith("<?xml")
    assert len(plot(found["contestants"]).axes) == 2
