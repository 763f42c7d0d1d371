"""Signals that end a run after the step it is in."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mptbook import world
from mptbook.settings import Ended


@dataclass
class Stop:
    came: signal.Signals | None = None  # to this process
    by: signal.Signals | None = None  # the one that all processes know of

    def agree(self) -> None:
        """Hear of signals that came to any process, so that all end after the same step.

        One that comes later waits for the next call, or a process would leave the others alone.
        """
        came = self.came
        interrupted, terminated = world.total((came == signal.SIGINT, came == signal.SIGTERM))
        if interrupted or terminated:
            self.by = signal.SIGTERM if terminated else signal.SIGINT


class Stopped(Ended):
    """SIGTERM ended the run; its checkpoint is written. EX_TEMPFAIL of sysexits.h: try again."""

    code = 75


@contextmanager
def stop_after_step() -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM. A second Ctrl-C ends the process as usual; a second SIGTERM means
    the first: schedulers send it to a launcher and to its processes, and the launcher passes it on.

    Signals reach the main thread only: in another one nothing is ever noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number, frame):
        stop.came = signal.Signals(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    signals = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
