"""Keep freed memory, so that the next training step does not pay for it again."""

import ctypes
import sys

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed blocks to the kernel; whether it listened.

    By default a large block is mapped from the kernel anew each time, and its pages are
    zeroed one fault at a time: a third of a small model's training step on a CPU. Only Linux
    with glibc has these switches; elsewhere nothing happens. The process never gives memory
    back while it runs, so this is for programs that train.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    switches = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    heard = [mallopt(name, value) for name, value in switches.items()]  # all, not the first
    return all(heard)
