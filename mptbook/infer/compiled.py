"""How loops are compiled, on how many threads they run, and numbers as weights are stored.

Numba compiles a loop at its first call, for the types that it is called with and the processor
that it runs on: seconds, kept on disk until a file of this folder changes.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
import torch
from numba import float32, int32, njit, types, uint16, uint32
from numba.core import caching
from numba.extending import overload

# NumPy's division: one that had to raise for a zero would keep a loop from using wide registers.
EXACT = {"error_model": "numpy", "cache": True, "nogil": True}
# A call within a loop over outputs hands over and counts every array that it is given: for a
# short row of weights that takes as long as the row (measured).
INLINE = EXACT | {"forceinline": True}
EXACT_PARALLEL = EXACT | {"parallel": True}
# A sum may be taken in any order, which lets the compiler use wide registers; infinities and
# NaN keep their meaning.
COMPILED = EXACT | {"fastmath": {"reassoc", "contract", "nsz"}}
PARALLEL = COMPILED | {"parallel": True}

GROUP = 64  # inputs that share a scale where weights have 4 bits

FOLDER = Path(__file__).parent
SOURCES = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")))
STAMP = hashlib.sha256(SOURCES).hexdigest()


class Locator:
    """Where Numba keeps a loop of this folder, and whether what lies there is still that loop.

    Numba itself looks at the file of a loop alone. What the loop calls is compiled into it, so
    after an update of another file it would go on with the old code.
    """

    @classmethod
    def from_function(cls, function: Callable, file: str) -> object | None:
        """One of Numba's locators; None for what is not ours."""
        if Path(file).parent != FOLDER:
            return None
        places = caching.UserProvidedCacheLocator, caching.InTreeCacheLocator
        for place in (*places, caching.UserWideCacheLocator):
            if (found := place.from_function(function, file)) is not None:
                found.get_source_stamp = lambda: STAMP
                return found
        return None


def _locators() -> str:
    """The setting of Numba's that puts ours before those that it has."""
    usual = "UserProvided", "InTree", "UserWide", "IPython", "Zip"
    others = numba.config.CACHE_LOCATOR_CLASSES or ",".join(f"{n}CacheLocator" for n in usual)
    return f"{__name__}.{Locator.__name__},{others}"


numba.config.CACHE_LOCATOR_CLASSES = _locators()


class _Numbas(threading.local):
    """What Numba was told last, which it keeps for each thread: to tell it again takes 20 µs where
    what has to be run for that has left the processor's caches (measured)."""

    threads = 0


_numbas = _Numbas()


@contextmanager
def pytorchs_threads() -> Iterator[None]:
    """Compiled loops take as many threads as PyTorch may, and PyTorch keeps its own number."""
    n_threads = torch.get_num_threads()
    if _numbas.threads != n_threads:
        numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
        _numbas.threads = n_threads
    try:
        yield
    finally:
        if torch.get_num_threads() != n_threads:  # numba's OpenMP layer sets its own for both
            torch.set_num_threads(n_threads)


def widen(x):
    """The float32 that a stored number stands for."""
    raise AssertionError("compiled code only")


@overload(widen, jit_options=COMPILED)
def _widen(x):
    if x == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: float32(x)


@njit(**INLINE)
def two(byte):
    """The two numbers, from -8 to 7, of a byte of 4 bits each."""
    whole = int32(byte)
    return float32((whole & int32(15)) - int32(8)), float32((whole >> int32(4)) - int32(8))


def narrow(number, array):
    """A float32 as an array of float32, or of the bits of bfloat16, keeps it."""
    raise AssertionError("compiled code only")


@overload(narrow, jit_options=COMPILED)
def _narrow(number, array):
    return bfloat16_bits if array.dtype == types.uint16 else lambda number, array: number


def bfloat16_bits(number, array):
    bits = np.float32(number).view(np.uint32)
    odd = uint32((bits >> uint32(16)) & uint32(1))  # to the nearest, halves to the even
    return uint16(uint32(bits + uint32(0x7FFF) + odd) >> uint32(16))
