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
    by: signal.Signals | None = None  # the one that came

    def agree(self) -> None:
        """Hear of signals that came to other processes, so that all end after the same step."""
        came = self.by == signal.SIGINT, self.by == signal.SIGTERM
        interrupted, terminated = world.total(came)
        if interrupted or terminated:
            self.by = signal.SIGTERM if terminated else signal.SIGINT


class Stopped(Ended):
    """SIGTERM ended the run; its checkpoint is written. EX_TEMPFAIL of sysexits.h: try again."""

    code = 75


@contextmanager
def stop_after_step() -> Iterator[Stop]:
    """Notes the first Ctrl-C or SIGTERM; a second one ends the process as usual.

    Signals reach the main thread only: in another one nothing is ever noted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number, frame):
        stop.by = signal.Signals(number)
        restore()

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    signals = signal.SIGINT, signal.SIGTERM
    previous = {number: signal.signal(number, note) for number in signals}
    try:
        yield stop
    finally:
        restore()
