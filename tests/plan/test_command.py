"""`mptbook plan`: what it prints, writes and refuses."""

import json
import re
from dataclasses import replace

import pytest

from mptbook.__main__ import main
from mptbook.directory import save_model
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.plan.advice import misfit, ways_out
from mptbook.plan.command import Plan, lines
from mptbook.plan.costs import GPUS
from mptbook.plan.memory import Setup, largest_micro_batch

STAGE_3 = (
    "mpt-30b --gpus 256 --gpu h100-80 --seq 8192 --batch 512 --tokens 50e9 --optimizer lion "
    "--precision pure --recompute block"
)


def planned(arguments, capsys):
    code = main(["plan", *arguments.split()])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_last_stage_of_mpt_30b(capsys):
    code, out, err = planned(STAGE_3, capsys)
    assert (code, err) == (0, "")
    assert "29,957,200,896 parameters" in out
    assert "4,194,304 tokens" in out
    assert "11,921 steps" in out
    assert "29.92 % for 30b, rows of 8,192, 8 x H100-80GB, recomputed" in out
    assert re.search(r"1\.63 days, 10,019 GPU hours$", out, re.MULTILINE)
    assert re.search(r"16 bits: weights 55\.8 GiB.*held by A100-80GB", out)


def test_every_part_of_the_memory_is_printed_and_they_add_up(capsys):
    _, out, _ = planned(STAGE_3, capsys)
    columns = {
        part: [float(size) for size in re.search(rf"^  {part} +(.*)$", out, re.M)[1].split()]
        for part in "weights gradients optimizer activations logits buffers total".split()
    }
    total = columns.pop("total")
    for moment in (0, 1):
        parts = sum(sizes[moment] for sizes in columns.values())
        assert parts == pytest.approx(total[moment], abs=0.3)  # each is rounded to a tenth


def test_figures_are_written_as_printed(tmp_path, capsys):
    file = tmp_path / "plan.json"
    planned(f"{STAGE_3} --price 2 --out {file}", capsys)
    found = json.loads(file.read_text())
    assert found["run"]["cost"] == pytest.approx(2 * found["run"]["gpu_hours"])
    assert found["memory"]["moments"]["backward"]["total"] > 0
    assert lines(found)[0].startswith("mpt-30b on 256 x H100-80GB")
    assert planned(f"mpt-7b --out {file}", capsys)[0] == 0  # figures give way to figures
    file.write_text("a thesis")
    code, _, said = planned(f"mpt-7b --out {file}", capsys)
    assert (code, file.read_text()) == (2, "a thesis")
    assert "is there already and holds no figures; choose another --out" in said


def test_a_run_that_does_not_fit_is_printed_as_far_as_it_goes_and_refused(capsys):
    code, out, err = planned("mpt-30b --gpus 8 --gpu a100-40 --recompute none", capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(r"one row of 8,192 tokens needs [\d.]+ GiB on each, [\d.]+ GiB more", err)
    assert "it would fit with H200-141GB, or --recompute block and 16 GPUs\n" in err
    assert "activations" in out
    assert "16 bits" in out
    assert "days" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mpt-7b --gpu a10", "gpu is 'a10'; it must be one of T4, .*did you mean"),
        ("mpt-7b --recompute some", "recompute is 'some'; it must be none, block, or a number k"),
        ("mpt-7b --recompute 0", "recompute is '0'; it must be"),
        ("mpt-7", "mpt-7 is not a named model .*did you mean mpt-7b"),
        ("mpt-7b --batch 100", "batch=100 rows do not divide over 8 GPUs; take 96 or 104"),
        ("mpt-7b --batch 3", "batch=3 rows do not divide over 8 GPUs; take 8"),
        ("mpt-7b --shards 5", "shards=5 does not divide gpus=8"),
        ("mpt-7b --mfu 1.5", "mfu='1.5': input should be less than or equal to 1"),
        ("mpt-7b --token 1", "token is not a setting; did you mean tokens"),
    ],
)
def test_a_mistake_is_one_line_with_value_rule_and_way_out(arguments, message, capsys):
    code, out, err = planned(arguments, capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_a_model_directory_is_planned_by_its_configuration(tmp_path, capsys):
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=77, max_seq_len=19)
    save_model(MPT(config), tmp_path / "model")
    found = Plan(model=str(tmp_path / "model"), gpus=1).figures()
    assert found["setup"]["row_tokens"] == 19
    assert found["model"]["parameters"] == sum(p.numel() for p in MPT(config).parameters())


def test_rows_longer_than_learned_positions_are_refused(tmp_path):
    config = MPTConfig(d_model=24, n_heads=3, n_layers=2, vocab_size=77, max_seq_len=19)
    save_model(MPT(config.replace(alibi=False)), tmp_path / "model")
    with pytest.raises(ValueError, match=r"rows of 20 tokens, but learned positions end at .*=19"):
        Plan(model=str(tmp_path / "model"), seq=20).figures()


def test_a_batch_is_cut_into_micro_batches_that_fit_and_divide_it():
    found = Plan(model="mpt-7b", gpus=8, gpu="a100-40", batch=8 * 100).figures()
    largest, micro = found["memory"]["largest_micro_rows"], found["memory"]["micro_rows"]
    assert micro == max(n for n in range(1, largest + 1) if 100 % n == 0)
    assert found["step"]["micro_batches"] * micro == 100
    moved = found["traffic"]
    assert moved["per_step"] == moved["per_micro_batch"]["total"] * found["step"]["micro_batches"]


def test_without_a_batch_a_step_is_what_fits_at_once():
    found = Plan(model="mpt-1b", gpus=3, gpu="l4").figures()
    assert found["step"]["rows"] == 3 * found["memory"]["largest_micro_rows"]
    assert found["step"]["micro_batches"] == 1


def test_a_gpu_that_nobody_measured_has_no_days_unless_a_share_is_given(capsys):
    code, out, _ = planned("mpt-1b --gpus 1 --gpu l4 --tokens 1e9", capsys)
    assert code == 0
    assert "nothing published was measured on L4; give --mfu" in out
    assert "days" not in out
    _, out, _ = planned("mpt-1b --gpus 1 --gpu l4 --tokens 1e9 --mfu 0.4", capsys)
    assert "MFU 40.0%, HFU 53.3%: given" in out
    assert "days" in out


def test_days_are_tokens_over_speed():
    found = Plan(model="mpt-1b", gpus=4, tokens=1e9, mfu=0.5, recompute="none").figures()
    rate = 4 * 0.5 * 312e12 / found["model"]["flops_per_token"]
    assert found["speed"]["tokens_per_second"] == pytest.approx(rate)
    assert found["run"]["days"] == pytest.approx(1e9 / rate / 86_400)
    steps, seconds = found["run"]["steps"], found["speed"]["step_seconds"]
    assert steps * seconds == pytest.approx(86_400 * found["run"]["days"])


SETUPS = [
    ("mpt-30b", Setup(8, 8192, recompute=0), "A100-80GB"),
    ("mpt-30b", Setup(8, 8192), "A100-40GB"),
    ("mpt-7b", Setup(16, 65_536, "adamw", shards=2), "A100-80GB"),
    ("mpt-7b", Setup(2, 2048, "adamw", "full"), "A100-40GB"),
    ("mpt-1b", Setup(1, 2048, "adamw"), "T4"),
]


@pytest.mark.parametrize(("name", "setup", "gpu"), SETUPS)
def test_what_is_advised_fits(name, setup, gpu):
    config = MPTConfig.named(name)
    assert not largest_micro_batch(config, setup, GPUS[gpu])
    for way in ways_out(config, setup, gpu):
        changed, card = _followed(setup, gpu, way)
        assert largest_micro_batch(config, changed, GPUS[card]), way
    assert "it would fit with" in misfit(config, setup, gpu, name)


def _followed(setup, gpu, way):
    if way in GPUS:
        return setup, way
    if gpus := re.fullmatch(r"(\d+) GPUs", way):
        return replace(setup, gpus=int(gpus[1]), shards=None), gpu
    if row := re.fullmatch(r"rows of ([\d,]+) tokens", way):
        return replace(setup, row_tokens=int(row[1].replace(",", ""))), gpu
    if way == "--shards left out":
        return replace(setup, shards=None), gpu
    flag, value = way.removeprefix("--").split()
    return replace(setup, **{flag: 1 if value == "block" else value}), gpu


def test_advice_on_rows_is_the_longest_multiple_of_128():
    config, setup = MPTConfig.named("mpt-7b"), Setup(8, 65_536, recompute=0)
    (row,) = (way for way in ways_out(config, setup, "A100-80GB") if way.startswith("rows"))
    longest = int(re.sub(r"\D", "", row))
    card = GPUS["A100-80GB"]
    assert longest % 128 == 0
    assert largest_micro_batch(config, Setup(8, longest, recompute=0), card) == 1
    assert not largest_micro_batch(config, Setup(8, longest + 128, recompute=0), card)


def test_where_nothing_single_helps_what_helps_together_is_named():
    config, setup = MPTConfig.named("mpt-7b"), Setup(1, 2048, "adamw", "full", 0)
    text = misfit(config, setup, "A100-40GB", "mpt-7b")
    together = "or --recompute block --precision pure --optimizer lion and 3 GPUs"
    assert text.endswith(together)
    assert not largest_micro_batch(config, Setup(2, 2048), GPUS["A100-40GB"])
    assert largest_micro_batch(config, Setup(3, 2048), GPUS["A100-40GB"])
