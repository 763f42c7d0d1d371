"""Contestants, each in a process of its own, of which one works at a time.

What one of them does to its process (its allocator, its memory) does not reach the others, and
they can take turns within one run, so that what slows the machine for a while slows all.
"""

import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any, Self


class Worker:
    """A process that makes something once and answers questions with it, one at a time.

    Args:
        name: for messages.
        make: a function of a module, called in the process with `arguments`; returns the
            function that answers.

    Raises:
        RuntimeError: from `ask`, if the process failed or ended; the message has its reason.
    """

    def __init__(self, name: str, make: Callable[..., Callable], *arguments: Any) -> None:
        self.name = name
        context = get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, arguments), name=name, daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, *question: Any) -> Any:
        """What the process answers; waits for it. The first answer waits for `make` too."""
        try:
            self._line.send(question)
            answer, error = self._line.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(
                f"{self.name}: its process ended with exit code {self._process.exitcode}"
            ) from None
        if error:
            raise RuntimeError(f"{self.name}: {error}")
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._line.close()
        self._process.terminate()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(line, make: Callable[..., Callable], arguments: tuple) -> None:
    """Answer until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    answer = None
    while True:
        try:
            question = line.recv()
        except EOFError:
            return
        try:
            answer = answer or make(*arguments)
            line.send((answer(*question), None))
        except Exception:  # told to the parent, which raises it
            line.send((None, traceback.format_exc(limit=-1).strip().splitlines()[-1]))
