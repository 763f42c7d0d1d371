import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mptbook

WIDEN = """
import torch
from mptbook.infer.widen import widened, widen_bytes
packed, scale = torch.tensor([[127]], dtype=torch.int8), torch.tensor([1.0059])
print(widened(packed, scale, torch.bfloat16).item())
print(sum(widen_bytes.stats.cache_hits.values()))
"""


def test_a_kept_loop_is_compiled_again_when_a_file_that_it_calls_has_changed(tmp_path):
    package = tmp_path / "mptbook"
    shutil.copytree(
        Path(mptbook.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    where = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def run():
        command = [sys.executable, "-c", WIDEN]
        ran = subprocess.run(
            command, env=os.environ | where, cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return [float(word) for word in ran.stdout.split()]

    # 127.7493 lies between 127.5 and 128, which bfloat16 has.
    assert run() == [127.5, 0]
    assert run() == [127.5, 1]
    compiled = package / "infer" / "compiled.py"
    text = compiled.read_text()
    assert text.count("uint32(0x7FFF)") == 1  # rounds to the nearest
    compiled.write_text(text.replace("uint32(0x7FFF)", "uint32(0xFFFF)"))  # rounds up
    assert run() == [128.0, 0]


@pytest.mark.parametrize(
    ("said", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_sleep_soon_unless_the_user_says_how_they_wait(said, spins):
    usual = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ask = "import os, sys, mptbook; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=usual | said, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [spins, "False"]  # torch reads it when it is loaded
