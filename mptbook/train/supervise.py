"""Run a command in a process of its own, and resume it when it crashes or hangs."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from mptbook.settings import Ended, RunSettings

if TYPE_CHECKING:
    from mptbook.train.course import Training

# Ends that another start would not change: done, a mistake of the user, diverged, SIGTERM, Ctrl-C.
FINAL = (0, 2, 3, 75, 130)
SECONDS_BETWEEN_LOOKS = 1.0


class GaveUp(Ended):
    """The process crashed more often than it may; `code` is how it ended last."""

    code = 1


class Finished(Ended):
    """The process ended and said why; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.code = code


def supervise(verb: str, settings: "Training") -> None:
    """Run `mptbook VERB` with these settings; after a crash again, with `resume`.

    A process whose log stands still for `settings.silence` seconds is killed, which counts as a
    crash. A SIGTERM is passed on, Ctrl-C reaches both processes; then this one waits for the
    other, and starts no more.

    Raises:
        GaveUp: after `settings.restarts` resumes.
        Finished: if the process ended otherwise than well.
    """
    with _passed_on() as child:
        for attempt in range(settings.restarts + 1):
            code = _run_once(verb, settings, child, resume=settings.resume or attempt > 0)
            if code == 0:
                return
            if code in FINAL:
                raise Finished(code)
            if child.asked:  # too early for the process to save and say so
                raise Finished(130 if child.asked == signal.SIGINT else 75)
            print(f"the training process ended with {_told(code)}", flush=True)
    raise GaveUp(
        f"gave up after {settings.restarts} restarts; look at the output above, mend the cause "
        "and go on with --resume"
    )


@dataclass
class _Child:
    process: subprocess.Popen | None = None
    asked: signal.Signals | None = None  # the signal that asked for the end


@contextmanager
def _passed_on() -> Iterator[_Child]:
    """Passes SIGTERM on to the child, and notes that no other must be started."""
    child = _Child()

    def note(number, frame):
        child.asked = signal.Signals(number)
        if number == signal.SIGTERM and child.process:
            child.process.terminate()

    signals = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield child
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_once(verb: str, settings: "Training", child: _Child, resume: bool) -> int:
    """The exit code; minus the number of a signal that ended it."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(_settings_text(settings, resume))
        words = [sys.executable, "-m", "mptbook", verb, "--config", str(config)]
        child.process = subprocess.Popen(words)
        if child.asked == signal.SIGTERM:  # it came before there was a process to tell
            child.process.terminate()
        return wait(child.process, settings.out / "log.jsonl", settings.silence)


def _settings_text(settings: RunSettings, resume: bool) -> str:
    told = settings.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps(told | {"supervise": False, "resume": resume})


def wait(process: subprocess.Popen, log: Path, silence: float) -> int:
    """The exit code of a process, which is killed once its log stands still for `silence` s."""
    length, since = -1, time.monotonic()
    while True:
        try:
            return process.wait(timeout=min(SECONDS_BETWEEN_LOOKS, silence))
        except subprocess.TimeoutExpired:
            now = log.stat().st_size if log.exists() else 0
            if now != length:
                length, since = now, time.monotonic()
            elif time.monotonic() - since > silence:
                print(f"{log} stands still for {silence:,} s: the process is killed", flush=True)
                process.kill()


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
