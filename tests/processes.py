"""Start programs in several processes, as torchrun does."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(n, *words, restarts=0):
    """The words of a command in `n` processes; `words` is a script, or -m and a module."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    how = ["--nproc-per-node", str(n), "--max-restarts", str(restarts)]
    return [*launcher, *how, *map(str, words)]


def environment(**changes):
    how = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return os.environ | how | changes


def run(words, **changes):
    """Exit code, and all that was said."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment(**changes))
    return done.returncode, done.stdout + done.stderr


def start(words):
    """A process at work; what it says can be read from its `stdout`."""
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )


def wait_for(condition, process, seconds=120):
    """Until it holds; fails if the process ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
