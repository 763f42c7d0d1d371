import os
import signal
import time

import pytest

from mptbook.bench.workers import Worker


def divider(top):
    return lambda below: (top / below, os.getpid())


def ender():
    return lambda: os._exit(3)


def unmade():
    raise MemoryError("no room")


def test_a_worker_answers_in_its_own_process_and_survives_its_errors():
    with Worker("divide", divider, 6) as worker:
        half, where = worker.ask(2)
        assert half == 3
        assert where != os.getpid()
        with pytest.raises(RuntimeError, match="divide: ZeroDivisionError: division by zero"):
            worker.ask(0)
        assert worker.ask(3) == (2, where)


def test_a_process_that_ends_is_an_error_with_its_exit_code():
    with (
        Worker("ender", ender) as worker,
        pytest.raises(RuntimeError, match="ender: its process ended with exit code 3"),
    ):
        worker.ask()


def test_what_cannot_be_made_is_an_error_each_time():
    with Worker("unmade", unmade) as worker:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="unmade: MemoryError: no room"):
                worker.ask()


def sleeper():
    return lambda: time.sleep(600)


def test_leaving_ends_a_process_at_work():
    worker = Worker("sleeper", sleeper)
    worker._line.send(())  # a question whose answer nobody waits for
    worker.close()
    assert worker._process.exitcode == -signal.SIGTERM
