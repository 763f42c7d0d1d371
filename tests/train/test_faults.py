"""Faults that a run must survive. Each is done to the real command in a process of its own."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run, start, wait_for
from safetensors.torch import load_file

from mptbook.train.checkpoint import checkpoints
from mptbook.train.log import read_history, read_log
from mptbook.train.supervise import wait

FAULTY = str(Path(__file__).with_name("faulty.py"))
# Five losses of a small run lie close together by chance: 6 of their deviations are not enough.
GUARD = {"guard.window": 5, "guard.threshold": 40, "guard.lead": 2, "guard.patience": 1}


def with_fault(kind, places):
    return {"start": (sys.executable, FAULTY, kind, places)}


def steps_logged(out):
    return len(read_log(out, "step")) if (out / "log.jsonl").exists() else 0


def lines(out, kind):
    history = read_history(out) if (out / "log.jsonl").exists() else []
    return (line for line in history if line["kind"] == kind)


def assert_same_end(a, b):
    """Weights, optimizer, random state and guard of the last checkpoints, bit for bit."""
    last, other = checkpoints(a)[-1], checkpoints(b)[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        x, y = load_file(last / name), load_file(other / name)
        assert x.keys() == y.keys()
        for key in x:
            assert torch.equal(x[key], y[key]), key
    assert json.loads((last / "state.json").read_text()) == json.loads(
        (other / "state.json").read_text()
    )
    weights = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert all(torch.equal(x, y) for x, y in zip(*(w.values() for w in weights), strict=True))


def kill_again_and_again(words, out, times, dice):
    """Kill -9 at random moments; what each kill left half written."""
    left = []
    for attempt in range(times):
        process = start([*words, "--resume"] if attempt else words)
        lines = len(read_history(out)) if (out / "log.jsonl").exists() else 0
        log = out / "log.jsonl"
        wait_for(lambda log=log, n=lines: log.exists() and len(read_history(out)) > n, process)
        time.sleep(dice.uniform(0, 0.4))
        process.kill()
        process.wait()
        left += [path.name for path in out.glob("*partial*")]
    return left


@pytest.mark.parametrize(
    "times", [3, pytest.param(30, marks=pytest.mark.slow)], ids=lambda n: f"{n} times"
)
def test_a_run_killed_again_and_again_ends_like_an_unbroken_one(command, tmp_path, times):
    # With a batch that makes the run go back, so that the guard's state matters too. A
    # checkpoint after every second step: much of the time one is being written.
    steps = 60 + 40 * times
    how = {"steps": steps, "save_every": 2, "heldout_every": 1000} | GUARD
    how |= with_fault("loss", "30")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, said = run(command(whole, **how))
    assert code == 0, said
    words = command(killed, **how)
    left = kill_again_and_again(words, killed, times, random.Random(times))
    code, said = run([*words, "--resume"])
    assert code == 0, said
    assert_same_end(whole, killed)
    assert sum(line["kind"] == "started" for line in read_history(killed)) == times + 1
    if times > 3:
        assert left, "no kill hit a checkpoint that was being written"
        print(f"{len(left)} of {times} kills left a checkpoint half written")


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """A run of 12 steps with checkpoints after 8 and 12."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    code, said = run(command(out, save_every=4))
    assert code == 0, said
    return out


@pytest.mark.parametrize("spoil", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_passed_over(command, whole, tmp_path, spoil):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "model")
    spoil(part / "step-000012" / "model.safetensors")
    code, said = run(command(part, "--resume", save_every=4))
    assert code == 0, said
    assert "step-000012 is damaged and passed over: model.safetensors is not as" in said
    (line,) = lines(part, "damaged")
    assert (line["path"], line["step"]) == ("step-000012", 8)
    assert (part / "damaged-step-000012").exists()
    assert_same_end(whole, part)


def test_what_looks_like_a_newer_checkpoint_does_not_mislead(command, whole, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "step-000012")
    (part / "latest").symlink_to("step-000012")  # as other tools leave it, stale
    (part / "step-000099").mkdir()
    (part / "step-000099" / "model.safetensors").write_text("half")
    code, said = run(command(part, "--resume", save_every=4))
    assert code == 0, said
    assert "step-000099 is damaged and passed over: SHA256SUMS is missing" in said
    assert_same_end(whole, part)


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_full_disk_leaves_the_last_checkpoint_and_a_line(command, tmp_path):
    whole, small = tmp_path / "whole", tmp_path / "small"
    how = {"steps": 20, "save_every": 8, "heldout_every": 1000}
    assert run(command(whole, **how))[0] == 0
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        filler = small / "filler"
        filler.write_bytes(bytes(500_000))  # leaves room for two checkpoints and not for three
        code, said = run(command(small / "run", **how))
        assert code == 1
        assert "step 16  no checkpoint: " in said
        assert "No space left" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert [path.name for path in checkpoints(small / "run")] == ["step-000000", "step-000008"]
        filler.unlink()
        code, said = run(command(small / "run", "--resume", **how))
        assert code == 0, said
        assert_same_end(whole, small / "run")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_gradient_that_is_not_finite_is_not_applied(command, tmp_path):
    out = tmp_path / "run"
    code, said = run(command(out, save_every=4, **with_fault("nan", "7")))
    assert code == 0, said
    assert "step 8  not taken: the norm of the gradient is nan" in said
    taken = read_log(out, "step")
    assert [line["step"] for line in taken if line["refused"]] == [8]
    assert taken[7]["grad_norm"] is None
    # The checkpoint that was due at step 8 waits until a step is sound again.
    assert [line["step"] for line in lines(out, "saved")] == [0, 4, 9, 12]
    assert not any(line["kind"] == "rollback" for line in read_history(out))
    for value in load_file(out / "step-000012" / "optimizer.safetensors").values():
        assert value.isfinite().all()


def test_several_in_a_row_make_the_run_go_back_and_leave_their_batches_out(command, tmp_path):
    out = tmp_path / "run"
    how = {"steps": 20, "save_every": 4, "guard.patience": 3, "guard.lead": 1}
    code, said = run(command(out, **how, **with_fault("nan", "9,10,11")))
    assert code == 0, said
    (line,) = lines(out, "rollback")
    # steps 10, 11 and 12 are refused, 9 is suspect; the checkpoint before that is of step 8
    assert (line["step"], line["to"], line["skipped"]) == (12, 8, [8, 9, 10, 11])
    assert not any(step["refused"] for step in read_log(out, "step"))
    history = [line["step"] for line in read_history(out) if line["kind"] == "step"]
    assert history == [*range(1, 13), *range(9, 21)]


def test_a_poisoned_batch_is_left_out(command, tmp_path):
    out = tmp_path / "run"
    how = {"steps": 24, "save_every": 4} | GUARD
    code, said = run(command(out, **how, **with_fault("loss", "14")))
    assert code == 0, said
    (line,) = lines(out, "rollback")
    assert (line["step"], line["to"], line["skipped"]) == (15, 12, [12, 13, 14])
    assert "standard deviations above" in line["reason"]
    losses = [step["loss"] for step in read_log(out, "step")]
    assert len(losses) == 24
    assert max(losses[12:]) < 7  # of a vocabulary of 320: ln 320 is 5.8


def test_a_run_that_keeps_diverging_stops_and_says_so(command, tmp_path):
    out = tmp_path / "run"
    how = {"steps": 60, "save_every": 4, "guard.rollbacks": 2} | GUARD
    code, said = run(command(out, **how, **with_fault("always", "14")))
    assert code == 3
    assert ": steps refused in a row: 1, after going back 2 times" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert sum(line["kind"] == "rollback" for line in read_history(out)) == 2
    # A higher bound and sound batches: the same directory can be gone on with.
    code, said = run(command(out, "--resume", **how | {"guard.rollbacks": 9}))
    assert code == 0, said


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_a_code_of_its_own(command, tmp_path, sent, code):
    whole, part = tmp_path / "whole", tmp_path / "part"
    how = {"steps": 100, "save_every": 1000, "heldout_every": 1000}
    process = start(command(part, **how))
    wait_for(lambda: steps_logged(part) > 10, process)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "saved; go on with the same command and --resume" in said.splitlines()[-1]
    assert "Traceback" not in said
    (stopped,) = lines(part, "stopped")
    assert stopped["by"] == sent.name
    assert checkpoints(part)[-1].name == f"step-{stopped['step']:06d}"
    assert run(command(part, "--resume", **how))[0] == 0
    assert run(command(whole, **how))[0] == 0
    assert_same_end(whole, part)


def children(process):
    """Training processes that a supervisor has started, as Linux lists them.

    Imports start others for a moment: ctypes asks ldconfig where libraries are.
    """
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in listed if is_training(Path("/proc", pid, "cmdline"))]


def is_training(cmdline):
    try:
        words = cmdline.read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False
    # Between fork and exec a child has the supervisor's own words.
    return b"mptbook" in words and b"--supervise" not in words


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_a_supervised_run_is_resumed_after_each_crash(command, tmp_path):
    whole, watched = tmp_path / "whole", tmp_path / "watched"
    how = {"steps": 200, "save_every": 5, "heldout_every": 1000}
    process = start(command(watched, "--supervise", **how))
    for kill in range(2):
        wait_for(lambda n=kill: len(list(lines(watched, "started"))) > n, process)
        enough = steps_logged(watched) + 8
        wait_for(lambda n=enough: steps_logged(watched) > n, process)
        (trainer,) = children(process)
        os.kill(trainer, signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("the training process ended with signal SIGKILL") == 2
    assert [line["resumed"] for line in lines(watched, "started")] == [False, True, True]
    assert run(command(whole, **how))[0] == 0
    assert_same_end(whole, watched)


def test_a_supervisor_passes_sigterm_on(command, tmp_path):
    out = tmp_path / "run"
    process = start(command(out, "--supervise", steps=5000, heldout_every=10_000))
    wait_for(lambda: steps_logged(out) > 3, process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "saved; go on" in said
    assert steps_logged(out) < 5000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_a_sigterm_that_comes_too_early_ends_a_supervised_run_too(command, tmp_path):
    # While the process still imports, it can neither save nor say so: the signal kills it.
    out = tmp_path / "run"
    process = start(command(out, "--supervise", heldout_every=10_000))
    wait_for(lambda: children(process), process)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert steps_logged(out) == 0
    assert run(command(out, "--resume"))[0] == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_a_supervised_run_that_hangs_is_killed_and_resumed(command, tmp_path):
    whole, hung = tmp_path / "whole", tmp_path / "hung"
    how = {"steps": 100, "save_every": 5, "heldout_every": 1000}
    process = start(command(hung, "--supervise", silence=20, **how))
    wait_for(lambda: steps_logged(hung) > 8, process)
    (trainer,) = children(process)
    os.kill(trainer, signal.SIGSTOP)  # alive, and not a step further
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "log.jsonl stands still for 20 s: the process is killed" in said
    assert run(command(whole, **how))[0] == 0
    assert_same_end(whole, hung)


def test_a_process_whose_log_grows_is_left_alone(tmp_path):
    log = tmp_path / "log.jsonl"
    grows = "import sys, time\nfor _ in range(20):\n    print(1, flush=True); time.sleep(0.1)"
    process = subprocess.Popen([sys.executable, "-c", grows], stdout=log.open("w"))
    assert wait(process, log, silence=1.5) == 0  # though it lives longer than that
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert wait(process, log, silence=0.3) == -signal.SIGKILL


def test_two_processes_do_not_write_to_one_run(command, tmp_path):
    out = tmp_path / "run"
    words = command(out, steps=5000, heldout_every=10_000, save_every=10)
    first = start(words)
    wait_for(lambda: steps_logged(out) > 3, first)
    code, said = run([*words, "--resume"])
    assert code == 2
    assert f"another process is writing to {out}" in said
    first.kill()  # leaves the lock file; its lock is gone with it
    first.wait()
    code, said = run(command(out, "--resume", steps=steps_logged(out) + 3, keep=1))
    assert code == 0, said
