"""Real processes train one small model; each number of them runs once, for all tests."""

import json

import pytest

from mptbook.__main__ import main
from mptbook.bench.fsdp import BenchFSDP, Failed, run_processes, together
from mptbook.model.config import MPTConfig
from mptbook.plan import parameters

D, V, LAYERS = 198, 331, 8  # 15 MB of weights: a process without any has some 250 MB
KINDS = ("weights", "gradients", "momentum")
SETTINGS = {"d-model": D, "n-layers": LAYERS, "n-heads": 6, "vocab-size": V, "row-tokens": 17}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "fsdp.json"
    flags = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    assert main(["bench", "fsdp", *flags, "--steps", "2", "--out", str(out)]) == 0
    return json.loads(out.read_text())


def part(rows, columns, processes):
    """Bytes of the largest part of a weight that is split by its rows."""
    return 4 * -(-rows // processes) * columns


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_process_holds_the_parts_counted_by_hand(found, n):
    block = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (D, 1), (D, 1)]
    expected = sum(part(*shape, n) for shape in [*block * LAYERS, (V, D), (D, 1)])
    for kind in KINDS:
        assert found["processes"][str(n)][kind] == expected, kind


@pytest.mark.parametrize("n", [2, 4])
def test_what_is_sharded_shrinks_with_the_processes(found, n):
    whole, each = found["processes"]["1"], found["processes"][str(n)]
    for kind in KINDS:
        assert whole[kind] / n <= each[kind] <= 1.1 * whole[kind] / n


@pytest.mark.parametrize("n", [2, 4])
def test_the_memory_of_a_process_shrinks_with_them(found, n):
    whole, each = found["processes"]["1"], found["processes"][str(n)]
    assert whole["resident_bytes"] > sum(whole[kind] for kind in KINDS)
    held, room = sum(each[kind] for kind in KINDS), 8e6  # for what a sharded program has more of
    assert held < each["resident_bytes"] < held + room < 0.75 * whole["resident_bytes"]
    assert each["build_bytes"] < 0.75 * whole["build_bytes"]
    assert each["peak_bytes"] < 0.75 * whole["peak_bytes"]


@pytest.mark.parametrize("n", [2, 4])
def test_losses_are_those_of_one_process(found, n):
    alone, several = (found["processes"][str(k)]["losses"] for k in (1, n))
    assert len(alone) == 5
    assert several == pytest.approx(alone, rel=1e-5)


def test_the_figures_say_of_what_they_are(found):
    assert found["settings"]["processes"] == [1, 2, 4]
    assert found["machine"]["cpu"]
    config = MPTConfig(d_model=D, n_layers=LAYERS, n_heads=6, vocab_size=V)
    assert found["parameters"] == parameters(config)["total"]
    for one in found["processes"].values():
        assert len(one["seconds"]) == 2
        assert min(one["seconds"]) > 0


def test_a_process_that_fails_is_an_error_with_what_it_said():
    with pytest.raises(Failed, match=r"(?s)1 processes ended with exit code 1; .*have no target"):
        run_processes(1, MPTConfig(d_model=24, n_heads=3, n_layers=1), rows=0, steps=1)


def test_rows_that_the_processes_cannot_share_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"rows=4 .* over 3 processes; take 6"):
        BenchFSDP(processes=[1, 3]).run()


def test_of_several_processes_the_largest_and_the_slowest_count():
    names = ("weights", "gradients", "momentum", "build_bytes", "resident_bytes", "peak_bytes")
    one, other = (dict.fromkeys(names, size) | {"losses": [2.5, 2.0]} for size in (7, 9))
    both = together([one | {"seconds": [1.0, 5.0, 2.0]}, other | {"seconds": [3.0, 1.0, 2.5]}])
    assert both["seconds"] == [3.0, 5.0, 2.5]
    assert both["median_seconds"] == 3.0
    assert [both[name] for name in names] == [9] * 6
    with pytest.raises(AssertionError, match="disagree"):
        together([one | {"seconds": []}, other | {"seconds": [], "losses": [2.5, 2.1]}])
