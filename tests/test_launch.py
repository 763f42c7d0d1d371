"""The launch files: what they start exists, and they start it. Slurm and ssh are stand-ins."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import environment, wait_for
from torch.distributed.run import get_args_parser

from mptbook.settings import CONFIGS
from mptbook.train.log import read_history
from mptbook.train.pretrain import Pretrain

LAUNCH = CONFIGS / "launch"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TRAP = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
STAND_INS = {
    # ssh -o X=Y ... HOST COMMAND, in this machine's sh
    "ssh": 'while [ "$1" = -o ]; do shift 2; done; shift; exec sh -c "$1"',
    # srun --option=value ... COMMAND; its process id is for scancel
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; echo $$ > step.pid; exec "$@"',
    "scancel": 'kill -s "${1#--signal=}" "$(cat step.pid)"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" > requeued; fi',
}


def bash_words(name, after):
    """The words of a command of a script that torchrun begins, up to the one that ends it."""
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if after in line and "pretrain" in line]
    return shlex.split(line.partition(after)[2])


def commands():
    """What follows `torchrun` in each launch file and in the README."""
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    (alone,) = re.findall(r"torchrun (--.*?)\n```", README, re.DOTALL)
    return {
        "slurm.sh": bash_words("slurm.sh", " torchrun "),
        "ssh.sh": bash_words("ssh.sh", '"$torchrun" '),
        "kubernetes.yaml": container["args"],
        "README.md": shlex.split(alone.replace("\\\n", " ")),
    }


def settings_of(words, monkeypatch):
    """The settings of `mptbook pretrain` in these words, as from the root of the repository."""
    monkeypatch.chdir(CONFIGS.parents[1])
    return Pretrain.from_command_line("pretrain", words[words.index("pretrain") + 1 :])


@pytest.mark.parametrize("name", ["slurm.sh", "ssh.sh"])
def test_bash_can_read_the_scripts(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0
    assert os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize("name", ["slurm.sh", "ssh.sh", "kubernetes.yaml", "README.md"])
def test_torchrun_and_mptbook_know_every_option(name, monkeypatch):
    given = ["--config", "mptbook/configs/7b.toml", "--data", "rows", "--out", "run"]
    words = []
    for word in commands()[name]:
        if word == "&":
            break
        # what only the shell, Slurm or Kubernetes will know is a number
        words += given if word == "$@" else [re.sub(r"\$\{.*?\}+|\$\(+.*?\)+|\$\w+", "8", word)]
    known = get_args_parser().parse_args(words)
    assert (known.module, known.training_script) == (True, "mptbook")
    assert known.max_restarts == "8" or int(known.max_restarts) == 8
    assert known.shutdown_timeout == 600
    settings = settings_of(words, monkeypatch)
    assert settings.resume
    assert settings.model == "mpt-7b"


def test_restarts_come_with_what_makes_them_work():
    launching = [*LAUNCH.iterdir(), Path(__file__).parents[1] / "README.md"]
    for path in launching:
        text = path.read_text()
        assert "--max-restarts" in text
        if path.suffix != ".yaml":  # that of Kubernetes is below
            assert TRAP in text, path.name
    for words in re.findall(r"^.*torchrun .*--max-restarts.*$", README, re.MULTILINE):
        assert words.startswith(TRAP)


def test_the_job_of_kubernetes_has_the_fields_of_the_operator():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["spec"]["nprocPerNode"] == "8"  # a string, as it may be "gpu" too
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert set(roles) == {"Master", "Worker"}
    assert 8 * sum(role["replicas"] for role in roles.values()) == 440
    for role in roles.values():
        assert role["restartPolicy"] == "OnFailure"
        pod = role["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] == ["torchrun"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        name, _, value = TRAP.partition("=")
        assert {"name": name, "value": value} in container["env"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted == {"shared": "/shared", "memory": "/dev/shm"}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        (wait,) = [w for w in container["args"] if w.startswith("--shutdown-timeout=")]
        assert int(wait.partition("=")[2]) < pod["terminationGracePeriodSeconds"]


def test_slurm_leaves_time_to_save():
    text = (LAUNCH / "slurm.sh").read_text()
    (before,) = re.findall(r"#SBATCH --signal=B:USR1@(\d+)", text)
    (wait,) = re.findall(r"--shutdown-timeout (\d+)", text)
    assert int(wait) + 60 < int(before)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A folder to work in, where ssh and Slurm's commands are stand-ins."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in STAND_INS.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    path = os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def started(words, **changes):
    changes = environment(**changes)
    del changes["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]  # the script shall say it
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=changes, **how)


def ended(process, seconds=120):
    """Exit code and all that was said."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, said


def pretraining(command, out, *flags, **changes):
    """The words that a launch file passes on, for a run of a few seconds on a CPU."""
    words = command(out, "--device", "cpu", *flags, start=(), **({"steps": 3} | changes))
    return words[words.index("pretrain") + 1 :]


def on_two_hosts(words, **changes):
    hosts = ["localhost,127.0.0.1"]
    how = {"GPUS": "1", "PORT": free_port(), "RESTARTS": "0"}
    return started([LAUNCH / "ssh.sh", *hosts, *words], **(how | changes))


def steps_taken(out):
    log = out / "log.jsonl"
    return sum(line["kind"] == "step" for line in read_history(out)) if log.exists() else 0


def test_two_hosts_train_one_model(command, stage):
    out = stage / "a run"  # a name that must be quoted on its way
    code, said = ended(on_two_hosts(pretraining(command, out)))
    assert code == 0, said
    assert said.count("model directory: ") == 1
    assert (out / "model" / "model.safetensors").exists()
    assert [line["processes"] for line in read_history(out) if line["kind"] == "started"] == [2]


def test_a_host_that_fails_ends_all(command, stage):
    words = pretraining(command, stage / "run")
    (stage / "bin" / "ssh").write_text(
        '#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\n'
        '[ "$1" = localhost ] || { sleep 3; exit 7; }\nexec sh -c "$2"\n'
    )
    begun = time.monotonic()
    code, said = ended(on_two_hosts(words))
    assert code == 7, said
    assert "error: a host ended with code 7; ending all" in said
    assert time.monotonic() - begun < 60


def kill_one(out):
    """One of the two processes that train, not a torchrun."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True).stdout
    ours = [line.split() for line in listed.splitlines() if str(out) in line]
    training = [int(pid) for pid, *args in ours if "-m" in args and "--nnodes" not in args]
    assert len(training) == 2
    os.kill(max(training), signal.SIGKILL)


@pytest.mark.parametrize("restarts", [2, 0])
def test_a_killed_process_is_started_again_if_it_may_be_and_else_ends_all(command, stage, restarts):
    out = stage / "run"
    words = pretraining(command, out, steps=400, save_every=20, heldout_every=1000)
    process = on_two_hosts(words, RESTARTS=str(restarts))
    wait_for(lambda: steps_taken(out) > 30, process)
    kill_one(out)
    code, said = ended(process)
    begun = [line["resumed"] for line in read_history(out) if line["kind"] == "started"]
    if restarts:
        assert code == 0, said
        assert begun == [False, True]
    else:
        assert code == 1, said
        assert "error: a host ended with code 1; ending all" in said
        assert begun == [False]
    assert (out / "model").is_dir() == bool(restarts)


def test_sigterm_saves_on_all_hosts(command, stage):
    out = stage / "run"
    process = on_two_hosts(pretraining(command, out, steps=4000, save_every=4000))
    wait_for(lambda: steps_taken(out) > 5, process)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 128 + signal.SIGTERM, said
    (stopped,) = [line for line in read_history(out) if line["kind"] == "stopped"]
    assert (out / f"step-{stopped['step']:06d}" / "state.json").exists()


SLURM = {"SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}


def test_slurm_trains_to_the_end(command, stage):
    out = stage / "run"
    code, said = ended(started([LAUNCH / "slurm.sh", *pretraining(command, out)], **SLURM))
    assert code == 0, said
    assert (out / "model" / "model.safetensors").exists()
    assert not (stage / "requeued").exists()


def test_slurm_saves_before_its_time_ends_and_comes_again(command, stage):
    out = stage / "run"
    words = pretraining(command, out, steps=4000, save_every=4000)
    process = started([LAUNCH / "slurm.sh", *words], **SLURM)
    wait_for(lambda: steps_taken(out) > 5, process)
    process.send_signal(signal.SIGUSR1)
    code, said = ended(process)
    assert code != 0
    (stopped,) = [line for line in read_history(out) if line["kind"] == "stopped"]
    assert stopped["by"] == "SIGTERM"
    assert (out / f"step-{stopped['step']:06d}" / "state.json").exists(), said
    assert (stage / "requeued").read_text() == "requeue 17\n"


def test_slurm_does_not_come_again_when_torchrun_has_given_up(stage):
    (stage / "bin" / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    (stage / "bin" / "torchrun").chmod(0o755)
    code, _ = ended(started([LAUNCH / "slurm.sh", "--out", "run"], **SLURM))
    assert code == 3
    assert not (stage / "requeued").exists()


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["slurm.sh"], SLURM, "usage: sbatch slurm.sh --config FILE --data ROWS --out RUN"),
        (["slurm.sh", "--out", "a"], {}, "this is no Slurm job; start it by sbatch"),
        (
            ["slurm.sh", "--out", "a"],
            SLURM | {"SLURM_GPUS_ON_NODE": ""},
            "the job has no GPUs; sbatch --gpus-per-node 8",
        ),
        (["ssh.sh", "--out"], {}, "usage: ssh.sh HOSTS --config FILE --data ROWS --out RUN"),
        (
            ["ssh.sh", "a,b", "--out", "c"],
            {"GPUS": "x"},
            "GPUS=x is no number of GPUs of each host",
        ),
        (["ssh.sh", "/dev/null/a", "rows"], {}, "usage: ssh.sh HOSTS --config FILE --data ROWS"),
        (["ssh.sh", "empty", "--out", "c"], {}, "empty names no host; write one a line"),
    ],
)
def test_what_a_script_cannot_use_is_one_line(stage, words, changes, message):
    (stage / "empty").write_text("\n")
    name, *rest = words
    code, said = ended(started([LAUNCH / name, *rest], **changes))
    assert code == 2
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_the_package_takes_the_launch_files_along():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "configs/launch/*" in project["tool"]["setuptools"]["package-data"]["mptbook"]
