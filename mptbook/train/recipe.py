"""The small model that the chapters share: trained once, then taken from the cache."""

import ast
import hashlib
import json
from pathlib import Path

from mptbook import wheels
from mptbook.data.prepare import Prepare, prepare
from mptbook.data.vocabulary import LearnTokenizer
from mptbook.model.config import MPTConfig
from mptbook.settings import CONFIGS, cache_dir, fast_mode
from mptbook.train.pretrain import Pretrain, pretrain

ROOMS = ("tokenizer", "data", "model", "optim", "train")  # whose code a trained model depends on
FAST = {"steps": 20, "heldout_characters": 4096}  # what MPTBOOK_FAST=1 leaves of a run


def trained(name: str = "tiny") -> Path:
    """The run directory of `configs/NAME.toml`, trained here if the cache has none.

    Learns the tokenizer, prepares the rows, trains and saves, each step only if its result
    is missing. The cache is keyed on the settings, the texts and the code that training runs:
    after a change of any of them the model is trained again. For `tiny` that takes about
    eight minutes on two cores; with `MPTBOOK_FAST=1` a few seconds, and the model is bad.
    """
    changes = FAST if fast_mode() else {}
    home = cache_dir() / "runs" / f"{name}-{_key(name, changes)}"
    vocabulary, rows, run = home / "tokenizer.json", home / "rows", home / "run"
    if (run / "model").exists():
        return run
    settings = Pretrain.from_toml(CONFIGS / f"{name}.toml", data=rows, out=run, **changes)
    config = MPTConfig.named(settings.model).replace(**settings.shape)
    if not vocabulary.exists():
        LearnTokenizer(out=vocabulary, vocab_size=config.vocab_size).run()
    prepare(Prepare(out=rows, tokenizer=str(vocabulary), row_tokens=config.max_seq_len))
    if run.exists():
        settings.resume = True  # an earlier call was interrupted
    pretrain(settings)
    return run


def _key(name: str, changes: dict) -> str:
    digest = hashlib.sha256((CONFIGS / f"{name}.toml").read_bytes())
    digest.update(json.dumps([changes, wheels.pins()]).encode())
    for room in ROOMS:
        for path in sorted((Path(__file__).parents[1] / room).rglob("*.py")):
            digest.update(_code(path).encode())
    return digest.hexdigest()[:12]


def _code(path: Path) -> str:
    """A module without comments and docstrings, which do not change what it computes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        documented = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


if __name__ == "__main__":
    print(f"the trained model: {trained() / 'model'}")
