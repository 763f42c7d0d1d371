"""The command line that trains a tiny model on the prepared folder `data`."""

import sys

import pytest

SHAPE = {"d_model": 24, "n_heads": 3, "n_layers": 2, "vocab_size": 320, "resid_pdrop": 0.1}


@pytest.fixture(scope="session")
def shape():
    return dict(SHAPE)  # with dropout, so that the random state matters


@pytest.fixture(scope="session")
def command(data):
    """`command(out, name=value, ...)`: the words of `mptbook pretrain` with these settings."""

    def words(out, *flags, start=(sys.executable, "-m", "mptbook"), **changes):
        values = {"data": data, "out": out, "steps": 12, "batch_tokens": 64, "optim.warmup": 2}
        shape = [word for key, value in SHAPE.items() for word in ("--shape", f"{key}={value}")]
        rest = [w for key, value in (values | changes).items() for w in (f"--{key}", str(value))]
        return [*start, "pretrain", *shape, *rest, *flags]

    return words
