"""Run a command in a process of its own, and resume it when it crashes."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from mptbook.settings import Ended, RunSettings

if TYPE_CHECKING:
    from mptbook.train.pretrain import Pretrain

# Ends that another start would not change: done, a mistake of the user, diverged, SIGTERM, Ctrl-C.
FINAL = (0, 2, 3, 75, 130)


class GaveUp(Ended):
    """The process crashed more often than it may; `code` is how it ended last."""

    code = 1


class Finished(Ended):
    """The process ended and said why; `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__("")
        self.code = code


def supervise(verb: str, settings: "Pretrain") -> None:
    """Run `mptbook VERB` with these settings; after a crash again, with `resume`.

    A SIGTERM is passed on, Ctrl-C reaches both processes; then this one waits for the other.

    Raises:
        GaveUp: after `settings.restarts` resumes.
        Finished: if the process ended otherwise than well.
    """
    for attempt in range(settings.restarts + 1):
        code = _run_once(verb, settings, resume=settings.resume or attempt > 0)
        if code == 0:
            return
        if code in FINAL:
            raise Finished(code)
        print(f"the training process ended with {_told(code)}", flush=True)
    raise GaveUp(
        f"gave up after {settings.restarts} restarts; look at the output above, mend the cause "
        "and go on with --resume"
    )


def _run_once(verb: str, settings: RunSettings, resume: bool) -> int:
    """The exit code; minus the number of a signal that ended it."""
    told = settings.model_dump(mode="json", exclude_none=True)
    told |= {"supervise": False, "resume": resume}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(tomli_w.dumps(told))
        process = subprocess.Popen([sys.executable, "-m", "mptbook", verb, "--config", str(config)])
        previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        }
        try:
            return process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
