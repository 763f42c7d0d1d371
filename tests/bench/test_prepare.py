import pytest

from mptbook.bench.prepare import BOUND, BenchPrepare


def test_every_way_is_timed_on_the_same_bytes(data):
    bench = BenchPrepare(tokenizer=str(data / "tokenizer.json"), domains=["plays"], repeats=1)
    found = bench.compare()
    assert set(found["ways"]) == {BOUND, "prepare, cut", "prepare, whole"}
    assert found["ways"][BOUND]["share"] == 1
    for way in found["ways"].values():
        seconds = found["bytes"] / 1e6 / way["mb_per_second"]
        assert way["seconds"] == pytest.approx([seconds])
