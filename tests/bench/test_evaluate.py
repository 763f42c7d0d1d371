"""The bench of evaluations measures what it says, at a small size."""

import pytest
import torch
from tiny_readers import mpt_reader

from mptbook.bench.evaluate import compare, sharing, untrained
from mptbook.eval.peer import SMOLLM2, peer_path
from mptbook.eval.reader import load_reader
from mptbook.eval.suite import load_suite, run_task


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return mpt_reader(tmp_path_factory.mktemp("models") / "mpt", max_seq_len=2048)


def test_every_model_is_asked_the_same_and_scored_by_every_convention(reader, monkeypatch):
    monkeypatch.setattr("mptbook.bench.evaluate.sharing", lambda reader, repeats: {"seconds": {}})
    tasks = {name: load_suite("default").tasks[name] for name in ("openbookqa", "arithmetic")}
    readers = {"one": reader, "other": untrained(reader)}
    found = compare(readers, tasks, items=5, repeats=1)
    one, other = found["models"]["one"], found["models"]["other"]
    assert one["openbookqa"]["golds"] == other["openbookqa"]["golds"]
    assert one["openbookqa"]["rights"] != other["openbookqa"]["rights"]
    rights = one["openbookqa"]["rights"]
    assert set(rights) == {"none", "tokens", "bytes", "characters", "unconditional"}
    plain = run_task(reader, tasks["openbookqa"], items=5)
    assert one["openbookqa"]["accuracy"] == plain["accuracy"] == rights["characters"].count("1") / 5
    assert one["openbookqa"]["error"] == pytest.approx(plain["error"])
    assert one["arithmetic"]["accuracy"] == 0
    assert "rights" not in one["arithmetic"]


def test_what_is_timed_reads_less_and_less(reader, monkeypatch):
    read, ask = [], reader.logits
    monkeypatch.setattr(
        reader,
        "logits",
        lambda ids, *rest, **how: read.append(ids.numel()) or ask(ids, *rest, **how),
    )
    totals = []

    def counted(runs, repeats):
        for run in runs.values():
            read.clear()
            run()
            totals.append(sum(read))
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr("mptbook.bench.evaluate.medians", counted)
    sharing(reader, shots=2, items=3, repeats=1)
    apart, question, examples = totals
    assert apart > 2 * question
    assert question > 1.2 * examples


def test_the_untrained_model_has_the_shape_and_other_weights(reader):
    blank = untrained(reader)
    pairs = zip(reader.model.parameters(), blank.model.parameters(), strict=True)
    assert all(a.shape == b.shape for a, b in pairs)
    same = untrained(reader).model.parameters()
    assert all(map(torch.equal, blank.model.parameters(), same))


@pytest.mark.slow  # fetches and reads a model of 135 million weights
def test_the_peer_finds_what_stands_in_its_context():
    pytest.importorskip("gguf")
    peer = load_reader(peer_path(SMOLLM2), max_tokens=2048)
    found = run_task(peer, load_suite("default").tasks["retrieval"], items=30)
    assert found["chance"] == 0.25
    assert found["accuracy"] > 0.5
