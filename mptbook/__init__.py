"""MPT models: train, finetune, evaluate, export and serve them; the package behind the book."""

import importlib
import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# How often a thread looks whether the others are done, before it sleeps; torch's OpenMP and Numba's
# read it when they are loaded. By default they look for milliseconds: beside another busy program
# threads then wait for those that their looking keeps from running. On two cores a token took 30
# times as long beside one such program, and with this twice as long; alone, both take the same.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Each name is imported when it is first used: `import mptbook` costs no more than a dict.
_HOME = {
    "MPT": "mptbook.model.mpt",
    "MPTConfig": "mptbook.model.config",
    "MPTForCausalLM": "mptbook.hf",
    "Tokenizer": "mptbook.tokenizer.tokenizer",
    "Mixture": "mptbook.data.mixture",
    "Curriculum": "mptbook.data.curriculum",
    "Lion": "mptbook.optim.lion",
    "train_steps": "mptbook.train.loop",
    "generate": "mptbook.infer.generate",
    "perplexity": "mptbook.eval.perplexity",
    "load_model": "mptbook.directory",
    "save_model": "mptbook.directory",
}
__all__ = [
    "MPT",
    "Curriculum",
    "Lion",
    "MPTConfig",
    "MPTForCausalLM",
    "Mixture",
    "Tokenizer",
    "generate",
    "load_model",
    "perplexity",
    "save_model",
    "train_steps",
]

if TYPE_CHECKING:
    from mptbook.data.curriculum import Curriculum
    from mptbook.data.mixture import Mixture
    from mptbook.directory import load_model, save_model
    from mptbook.eval.perplexity import perplexity
    from mptbook.hf import MPTForCausalLM
    from mptbook.infer.generate import generate
    from mptbook.model.config import MPTConfig
    from mptbook.model.mpt import MPT
    from mptbook.optim.lion import Lion
    from mptbook.tokenizer.tokenizer import Tokenizer
    from mptbook.train.loop import train_steps


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"mptbook has no {name}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
