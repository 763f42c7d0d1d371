"""Run a program that a model has written: in a process of its own that can do little harm.

The process has little time and memory, an empty folder and no environment. Where the system
allows it, it also has no network and no sight of other processes; elsewhere Python's sockets are
closed to it, and `isolation` says so. That keeps accidents in and is no prison: what was written
to break out belongs into a virtual machine.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 5.0
MEMORY = 1 << 30  # bytes of address space
FILE = 1 << 20  # bytes of the largest file
PROCESSES = 32

# What runs first in the process. A limit that is lowered like this cannot be raised again.
GUARD = """import os, resource, shutil, socket, subprocess
for what, most in {limits}:
    resource.setrlimit(getattr(resource, what), (most, most))
for name in ("fork forkpty system popen kill killpg remove unlink rmdir removedirs rename renames "
             "replace truncate chmod chown chroot symlink link putenv").split():
    setattr(os, name, None)
shutil.rmtree = shutil.move = shutil.chown = subprocess.Popen = None
if {without_sockets}:
    def refused(*_, **__):
        raise OSError("a program that is checked has no network")
    socket.socket = socket.create_connection = socket.getaddrinfo = refused
exec(compile(open("program.py", encoding="utf-8").read(), "program.py", "exec"),
     {{"__name__": "__main__"}})
"""


def run_checked(program: str, check: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> str:
    """`passed` if a program and then its checks run to their end; else what went wrong.

    Args:
        program, check: Python; they run as one file.
        seconds: by the clock; the processor is granted one more.
        memory: bytes of address space.

    Returns:
        ``passed``, ``timed out``, or the last line that the program said when it failed, as
        ``AssertionError``.
    """
    isolated = isolation()
    limits = {
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": FILE,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_CORE": 0,
    }
    guard = GUARD.format(limits=list(limits.items()), without_sockets=not isolated)
    # A program that exits early has not passed: only one that says what it cannot guess.
    ended = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        source = f"{program}\n{check}\nprint({ended!r})\n"
        Path(folder, "program.py").write_text(source, encoding="utf-8")
        process = subprocess.Popen(
            [*isolated, sys.executable, "-I", "-X", "utf8", "-c", guard],
            cwd=folder,
            env={"PATH": os.defpath, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            said, complaint = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
    if process.returncode == 0 and said.decode(errors="replace").endswith(f"{ended}\n"):
        return "passed"
    lines = complaint.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"ended with exit code {process.returncode}"


@cache
def isolation() -> tuple[str, ...]:
    """The command that takes network and other processes away; () where that is not permitted.

    What it starts is the first process of a world of its own, which ends with it, children and
    all.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, *"--user --map-root-user --net --pid --fork --kill-child".split())
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else ()


def _end(process: subprocess.Popen) -> None:
    """End the process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    process.wait()
