"""Whole runs of several processes under torchrun: equal to one, resumed, killed, hung."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from processes import environment, run, start, torchrun, wait_for
from safetensors.torch import load_file

from mptbook import load_model
from mptbook.train.checkpoint import checkpoints
from mptbook.train.log import read_history, read_log

EXACT = ("--shape", "resid_pdrop=0", "--precision", "fp32")  # dropout differs between processes
WHOLE = {"save_every": 4, "keep": 9, "heldout_every": 6}


def in_processes(n, restarts=0):
    return {"start": torchrun(n, "-m", "mptbook", restarts=restarts)}


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    """Runs of 12 steps of 1, 2 and 4 processes, and what they said."""
    folder = tmp_path_factory.mktemp("unbroken")
    found = {}
    for n in (1, 2, 4):
        how = in_processes(n) if n > 1 else {}
        code, said = run(command(folder / str(n), *EXACT, **WHOLE, **how))
        assert code == 0, said
        found[n] = folder / str(n), said
    return found


def assert_near(out, other, tolerance):
    for kind, key in (("step", "loss"), ("step", "grad_norm"), ("final", "bits_per_byte")):
        found, expected = ([line[key] for line in read_log(run, kind)] for run in (out, other))
        assert found == pytest.approx(expected, rel=tolerance), key
    model, expected = load_model(out), load_model(other)
    for (name, weight), right in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(weight, right, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("n", [2, 4])
def test_a_run_of_several_processes_is_that_of_one(unbroken, n):
    assert_near(unbroken[n][0], unbroken[1][0], 1e-5)
    for kind in ("sample", "stage"):
        found, expected = (read_log(unbroken[k][0], kind) for k in (n, 1))
        assert found == expected


def test_one_process_of_several_prints_and_logs(unbroken):
    out, said = unbroken[4]
    assert said.count("model directory") == said.count("step 12  all held out") == 1
    history = read_history(out)
    assert sum(line["kind"] == "step" for line in history) == 12
    assert history[0]["kind"] == "started"
    assert history[0]["processes"] == 4


def cut_back(source, step, target):
    """A run that was killed after the checkpoint of a step."""
    target.mkdir()
    for name in ("run.toml", "log.jsonl"):
        shutil.copy(source / name, target)
    shutil.copytree(source / f"step-{step:06d}", target / f"step-{step:06d}")


def test_another_number_of_processes_goes_on(unbroken, command, tmp_path):
    cut_back(unbroken[2][0], 4, tmp_path / "one")
    code, said = run(command(tmp_path / "one", "--resume", *EXACT, **WHOLE))
    assert code == 0, said
    cut_back(tmp_path / "one", 8, tmp_path / "four")
    code, said = run(command(tmp_path / "four", "--resume", *EXACT, **WHOLE, **in_processes(4)))
    assert code == 0, said
    started = read_log_lines(tmp_path / "four", "started")
    assert [(line["step"], line["processes"]) for line in started] == [(0, 2), (4, 1), (8, 4)]
    for out in ("one", "four"):
        assert_near(tmp_path / out, unbroken[1][0], 1e-6)


def test_a_checkpoint_of_several_processes_becomes_a_model_directory(unbroken, tmp_path):
    out, _ = unbroken[4]
    words = [sys.executable, "-m", "mptbook", "consolidate"]
    code, said = run([*words, str(out / "step-000012"), "--out", str(tmp_path / "model")])
    assert (code, said.strip()) == (0, f"model directory: {tmp_path / 'model'}")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (out / "model" / name).read_bytes()
    code, said = run([*words, str(out / "step-000004"), "--out", str(tmp_path / "model")])
    assert (code, "is there already" in said) == (2, True)
    with pytest.raises(FileNotFoundError, match=r"several processes; .* mptbook consolidate"):
        load_model(out / "step-000012")
    code, said = run([*words, str(out), "--out", str(tmp_path / "other")])
    assert code == 2
    assert said == f"error: {out} is no checkpoint; give a step-... folder of a run\n"


def test_a_model_directory_is_written_with_few_tensors_in_memory(unbroken, tmp_path, monkeypatch):
    from mptbook.train import snapshot

    seen = []
    load = snapshot._load

    def noted(tensors, *how, **ways):
        seen.append(list(tensors))
        load(tensors, *how, **ways)

    monkeypatch.setattr(snapshot, "_load", noted)
    out, _ = unbroken[2]
    snapshot.consolidate(out / "step-000012", tmp_path / "model", max_shard_bytes=20_000)
    assert len(seen) >= 4
    assert max(map(len, seen)) < sum(map(len, seen)) / 2
    model, expected = load_model(tmp_path / "model"), load_model(out)
    for weight, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, right)


def test_two_processes_evaluate_as_one_does(unbroken, data):
    out, _ = unbroken[1]
    words = ["evaluate", str(out), "--source", f"hares={data.parent / 'texts.jsonl'}"]
    alone = run([sys.executable, "-m", "mptbook", *words])
    assert alone[0] == 0, alone[1]
    assert run(torchrun(2, "-m", "mptbook", *words)) == alone


def steps_taken(out):
    log = out / "log.jsonl"
    return sum(line["kind"] == "step" for line in read_history(out)) if log.exists() else 0


def workers(process):
    """The processes that torchrun started, by place."""
    listed = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True
    )
    return sorted(int(line.split()[0]) for line in listed.stdout.splitlines() if "mptbook" in line)


def assert_same_end(out, other):
    """The last checkpoints of two processes, bit for bit."""
    last, expected = checkpoints(out)[-1], checkpoints(other)[-1]
    files = sorted(file.name for file in expected.glob("shard-*"))
    assert files == sorted(file.name for file in last.glob("shard-*"))
    assert len(files) == 4
    for file in files:
        x, y = load_file(last / file), load_file(expected / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x), file
    assert json.loads((last / "state.json").read_text()) == json.loads(
        (expected / "state.json").read_text()
    )


@pytest.mark.parametrize(
    "times", [1, pytest.param(10, marks=pytest.mark.slow)], ids=lambda n: f"{n} times"
)
def test_a_process_is_killed_and_torchrun_goes_on_to_the_same_weights(command, tmp_path, times):
    # With dropout, so that the random state of each process matters too.
    steps = 20 + 40 * times
    how = {"steps": steps, "save_every": 3, "heldout_every": 1000}
    code, said = run(command(tmp_path / "whole", **how, **in_processes(2)))
    assert code == 0, said
    out = tmp_path / "killed"
    process = start(command(out, "--resume", **how, **in_processes(2, restarts=times)))
    for number in range(times):
        before = steps_taken(out)
        wait_for(lambda n=before: steps_taken(out) > n + 12, process)
        os.kill(workers(process)[number % 2], signal.SIGKILL)
        wait_for(lambda n=number: len(read_log_lines(out, "started")) > n + 1, process)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert len(read_log_lines(out, "started")) == times + 1
    assert_same_end(out, tmp_path / "whole")


def read_log_lines(out, kind):
    log = out / "log.jsonl"
    return [line for line in read_history(out) if line["kind"] == kind] if log.exists() else []


def test_sigterm_to_torchrun_saves_and_the_run_goes_on(command, tmp_path):
    out = tmp_path / "run"
    how = {"steps": 400, "save_every": 1000, "heldout_every": 1000}
    process = start(command(out, **how, **in_processes(2)))
    wait_for(lambda: steps_taken(out) > 5, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "saved; go on with the same command and --resume" in said
    (stopped,) = read_log_lines(out, "stopped")
    assert stopped["by"] == "SIGTERM"
    assert checkpoints(out)[-1].name == f"step-{stopped['step']:06d}"


def test_a_process_that_hangs_is_named_and_all_end(command, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    how = {"steps": 4000, "save_every": 1000, "heldout_every": 10_000, "patience": 4}
    words = command(out, **how, batch_tokens=96, **in_processes(3))
    with said.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment())
    wait_for(lambda: steps_taken(out) > 5, process)
    hung = workers(process)[1]
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: one_line(said.read_text()), process)
    os.kill(hung, signal.SIGKILL)  # or torchrun would give it half a minute to end well
    assert process.wait() != 0
    (line,) = one_line(said.read_text())
    assert line.startswith("error: process 1 of 3 does not answer; look at its output and its ma")
    assert "Traceback" not in said.read_text().partition(line)[0]


def one_line(said):
    """The errors of mptbook among what torchrun says."""
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_rows_that_the_processes_cannot_share_are_refused(command, tmp_path):
    code, said = run(command(tmp_path / "run", **in_processes(3)))
    assert code != 0
    assert one_line(said) == [
        "error: batch_tokens=64 is 4 rows of 16, which 3 processes cannot share; take a multiple "
        "of 48 tokens, or another number of processes"
    ]
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named_and_the_checkpoint_before_serves(unbroken, command, tmp_path):
    for step in (4, 8):
        cut_back(unbroken[2][0], step, tmp_path / str(step))
    out = tmp_path / "8"
    shutil.move(tmp_path / "4" / "step-000004", out)
    (out / "step-000008" / "shard-00002-model-00001-of-00002.safetensors").unlink()
    words = command(out, "--resume", *EXACT, **WHOLE, **in_processes(2))
    code, said = run(words)
    assert code == 0, said
    assert "passed over: shard-00002-model-00001-of-00002.safetensors is missing" in said
    assert_near(out, unbroken[2][0], 1e-6)
    for path in checkpoints(out):
        (path / "shard-00001-model-00001-of-00002.safetensors").unlink()
    code, said = run(words)
    assert code != 0
    (line,) = one_line(said)
    assert "has no checkpoint that is whole" in line
    assert "shard-00001-model-00001-of-00002.safetensors is missing" in line


def test_what_torchrun_and_supervise_would_both_do_is_refused(command, tmp_path):
    code, said = run(command(tmp_path / "run", "--supervise", **in_processes(2)))
    assert code != 0
    assert one_line(said)[0].startswith("error: supervise is for a process alone; torchrun starts")


def test_restarts_that_torchrun_would_not_survive_are_refused(command, tmp_path):
    words = command(tmp_path / "run", **in_processes(2, restarts=1))
    code, said = run(words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
    assert code != 0
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set before it; set it" in one_line(said)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fsdp.replicas", "3"], "fsdp.replicas=3 does not divide 2 processes; take a divisor"),
        (
            ["--fsdp.precision", "default", "--precision", "fp32"],
            "fsdp.precision=default gathers weights in bfloat16, but products are in float32 "
            "(precision=fp32 on cpu); take fsdp.precision=full, or precision=bf16",
        ),
        (
            ["--micro-batch-tokens", "64"],
            "batch_tokens=64 is not a multiple of micro_batch_tokens=64 on each of 2 processes; "
            "take 128",
        ),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_refused(command, tmp_path, flags, message):
    code, said = run(command(tmp_path / "run", *flags, **in_processes(2)))
    assert code != 0
    assert one_line(said) == [f"error: {message}"]
