import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from mptbook.train.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    torch.ones(20_000_000)  # 80 MB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a switch of glibc on Linux")
def test_freed_memory_is_used_again_without_asking_the_kernel():
    def page_faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("keep") < 10 < page_faults("leave")
