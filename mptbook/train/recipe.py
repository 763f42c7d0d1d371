"""The small model that the chapters share: trained once, then taken from the cache."""

import ast
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import torch

from mptbook import wheels
from mptbook.data.corpora import WHEELS
from mptbook.data.prepare import Prepare, prepare
from mptbook.data.vocabulary import LearnTokenizer
from mptbook.model.config import MPTConfig
from mptbook.settings import CONFIGS, cache_dir, fast_mode
from mptbook.train.pretrain import Pretrain, pretrain

ROOT = Path(__file__).parents[1]


def trained(name: str = "tiny") -> Path:
    """The run directory of `configs/NAME.toml`, trained here if the cache has none.

    Learns the tokenizer, prepares the rows, trains and saves, each step only if its result
    is missing. The cache is keyed on the settings, the texts and the code that training runs:
    after a change of any of them the model is trained again. For `tiny` that takes nine to
    fifteen minutes on two cores with units for bfloat16, and up to forty on two that have
    registers of 256 bits and no such units; with `MPTBOOK_FAST=1` a few seconds, and the model
    is bad.
    Who asks while another process trains it, a second notebook for example, waits.
    """
    home = cache_dir() / "runs" / f"{name}-{_key(name)}{'-fast' if fast_mode() else ''}"
    run = home / "run"
    if not (run / "model").exists():
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home):
            if not (run / "model").exists():  # the other may have made it
                _train(name, home)
    return run


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    lock = filelock.FileLock(home / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        print(f"another process makes the model in {home}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _train(name: str, home: Path) -> None:
    vocabulary, rows, run = home / "tokenizer.json", home / "rows", home / "run"
    settings = Pretrain.from_toml(CONFIGS / f"{name}.toml", data=rows, out=run)
    if fast_mode():
        settings.steps, settings.optim.warmup, settings.heldout_characters = 20, 5, 4096
    config = MPTConfig.named(settings.model).replace(**settings.shape)
    if not vocabulary.exists():
        LearnTokenizer(out=vocabulary, vocab_size=config.vocab_size).run()
    prepare(Prepare(out=rows, tokenizer=str(vocabulary), row_tokens=config.max_seq_len))
    if run.exists():
        settings.resume = True  # an earlier call was interrupted
    pretrain(settings)


def _key(name: str) -> str:
    digest = hashlib.sha256((CONFIGS / f"{name}.toml").read_bytes())
    # The texts: those of wheels, and the code that Python brings along.
    digest.update(f"{[wheels.pins()[wheel] for wheel in WHEELS]}".encode())
    digest.update(f"{sys.version} {torch.__version__}".encode())
    for path in sorted(_modules()):
        digest.update(_code(path).encode())
    return digest.hexdigest()[:12]


def _modules() -> set[Path]:
    """The modules of the package whose code a run can depend on.

    Not those of `infer`: they write the samples in a run's log, and change no weight.
    """
    # The model loads some of its own by their names, which no import statement shows.
    found = {Path(__file__), *(ROOT / "model").glob("*.py")}
    unread = list(found)
    while unread:
        for node in ast.walk(ast.parse(unread.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mptbook"):
                # `from mptbook import wheels`, and `from mptbook.data.mixture import Mixture`
                names = node.module, *(f"{node.module}.{alias.name}" for alias in node.names)
                files = {
                    ROOT.parent.joinpath(*name.split(".")).with_suffix(".py") for name in names
                }
                new = {
                    file for file in files if file.is_file() and file.parent.name != "infer"
                } - found
                unread += new
                found |= new
    return found


def _code(path: Path) -> str:
    """A module without comments and docstrings, which do not change what it computes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        documented = ast.Module, ast.ClassDef, ast.FunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


if __name__ == "__main__":
    try:
        print(f"the trained model: {trained() / 'model'}")
    except KeyboardInterrupt:  # the run is saved, and the next call goes on with it
        sys.exit(130)
