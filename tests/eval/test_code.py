"""Programs that a model wrote are run, checked, and kept from doing harm."""

import os
import time
from pathlib import Path

import pytest

from mptbook.data.benchmarks import load_benchmark
from mptbook.eval import code
from mptbook.eval.code import run_checked

DOUBLE = "def double(x):\n    return 2 * x\n"
CHECK = "assert double(4) == 8\n"


@pytest.fixture(params=["isolated", "sockets closed"])
def either_way(request, monkeypatch):
    """With what the system permits, and as on a system that permits nothing."""
    if request.param == "sockets closed":
        monkeypatch.setattr(code, "isolation", tuple)
    elif not code.isolation():
        pytest.skip("this system lets no process give up its network")


def test_a_right_program_passes(either_way):
    assert run_checked(DOUBLE, CHECK) == "passed"


def test_a_wrong_program_fails_with_its_last_line(either_way):
    assert run_checked(DOUBLE, "assert double(4) == 9, 'not nine'\n") == "AssertionError: not nine"
    assert run_checked("def double(x)", CHECK).startswith("SyntaxError")


def test_a_program_that_exits_early_has_not_passed():
    assert run_checked(DOUBLE + "import sys\nsys.exit(0)\n", CHECK) == "ended with exit code 0"
    assert run_checked("import os\nos._exit(0)\n", CHECK) == "ended with exit code 0"


@pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(60)", "input()"])
def test_a_program_that_does_not_end_is_ended(loop):
    began = time.monotonic()
    outcome = run_checked(loop, "", seconds=0.7)
    assert outcome == "timed out" if "input" not in loop else outcome.startswith("EOFError")
    assert time.monotonic() - began < 5


def test_a_program_has_no_more_memory_than_granted():
    assert "MemoryError" in run_checked("x = bytearray(3 << 30)", "")
    assert run_checked("x = bytearray(100 << 20)", "") == "passed"


def test_a_program_has_no_network(either_way):
    outcome = run_checked(
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)\n", ""
    )
    assert "OSError" in outcome or "Error: [Errno" in outcome


def test_a_program_that_listens_cannot_be_reached(tmp_path):
    if not code.isolation():
        pytest.skip("this system lets no process give up its network")
    sends = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    assert "Network is unreachable" in run_checked(sends + "s.sendto(b'x', ('192.0.2.1', 9))\n", "")


def test_a_program_cannot_delete_files_or_start_others(tmp_path, either_way):
    kept = tmp_path / "kept.txt"
    kept.write_text("here")
    for attempt in (f"os.remove({str(kept)!r})", "os.system('true')", "os.fork()"):
        assert "TypeError" in run_checked(f"import os\n{attempt}\n", "")
    assert kept.read_text() == "here"


def test_what_a_program_has_started_ends_with_it(tmp_path):
    """Even what has left its process group, where the system permits a world of its own."""
    if not code.isolation():
        pytest.skip("this system lets no process have a world of its own")
    mark = tmp_path / "alive"
    lives_on = (
        "import posix, time\n"
        "if posix.fork() == 0:\n"
        "    posix.setsid()\n"
        f"    while True: open({str(mark)!r}, 'a').write('.'); time.sleep(0.05)\n"
        "time.sleep(0.4)\n"
    )
    assert run_checked(lives_on, "") == "passed"
    assert mark.exists()
    time.sleep(0.2)
    size = mark.stat().st_size
    time.sleep(0.3)
    assert mark.stat().st_size == size


def test_a_program_runs_in_an_empty_folder_that_is_gone_afterwards(tmp_path):
    where = tmp_path / "where"
    wrote = f"import os\nopen({str(where)!r}, 'w').write(os.getcwd())\nopen('own.txt', 'w')\n"
    assert (
        run_checked(wrote + "assert sorted(os.listdir()) == ['own.txt', 'program.py']", "")
        == "passed"
    )
    assert not Path(where.read_text()).exists()


def test_a_program_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    assert run_checked("import os\nassert 'A_SECRET' not in os.environ\n", "") == "passed"
    assert os.environ["A_SECRET"] == "1"


def test_the_solutions_of_humaneval_pass():
    for question in load_benchmark("humaneval")[::40]:
        assert run_checked(question.query + question.answers[0], question.check) == "passed"
