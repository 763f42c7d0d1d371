import json
import os
import sys

import pytest

# Its own products of 8 bits are off on some processors: see mptbook.export.ctranslate2.
os.environ.setdefault("CT2_USE_MKL", "1")
SHAPE = {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 320, "resid_pdrop": 0.1}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors here are tiny: a second thread costs more than it computes, up to tenfold."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared folder of a few sentences: rows of 16 tokens, ids below 300."""
    from mptbook.data.prepare import Prepare, prepare
    from mptbook.tokenizer.bpe import train_bpe

    folder = tmp_path_factory.mktemp("data")
    words = "hare ran miles over the hill and far away from here to there".split()
    texts = [" ".join(words[(n * k) % 13] for k in range(1, 40)) + ".\n" for n in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    train_bpe(texts, 300).save(folder / "tokenizer.json")
    source = {"hares": str(folder / "texts.jsonl")}
    tokenizer = str(folder / "tokenizer.json")
    prepare(Prepare(out=folder / "rows", tokenizer=tokenizer, row_tokens=16, source=source))
    return folder / "rows"


@pytest.fixture(scope="session")
def shape():
    return dict(SHAPE)  # with dropout, so that the random state matters


@pytest.fixture(scope="session")
def command(data):
    """`command(out, name=value, ...)`: the words that train a tiny model on `data`."""

    def words(out, *flags, start=(sys.executable, "-m", "mptbook"), **changes):
        values = {"data": data, "out": out, "steps": 12, "batch_tokens": 64, "optim.warmup": 2}
        shape = [word for key, value in SHAPE.items() for word in ("--shape", f"{key}={value}")]
        rest = [w for key, value in (values | changes).items() for w in (f"--{key}", str(value))]
        return [*start, "pretrain", *shape, *rest, *flags]

    return words
