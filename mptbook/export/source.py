"""The model directory that an export reads."""

from pathlib import Path

import torch

from mptbook.directory import ABOUT, read_config
from mptbook.export.fields import refuse
from mptbook.infer.text import check_vocabulary
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import read_json


def described(folder: Path, target: str) -> MPT:
    """The model of a directory, on "meta": its shape and the names of its weights.

    Raises:
        ValueError: for a field that the readers of `target` pass over.
    """
    config = read_config(folder)
    refuse(config, target)
    with torch.device("meta"):
        return MPT(config)


def place(name: str) -> tuple[str, str, str]:
    """The block's number, the part and the leaf of a weight's name.

    `transformer.blocks.3.attn.Wqkv.weight` is ("3", "attn.Wqkv", "weight"), and
    `transformer.wte.weight` is ("", "wte", "weight").
    """
    part, _, leaf = name.removeprefix("transformer.").rpartition(".")
    if not part.startswith("blocks."):
        return "", part, leaf
    _, number, part = part.split(".", 2)
    return number, part, leaf


def token_names(tokenizer: Tokenizer, n_ids: int, missing: str) -> list[str]:
    """What the tokenizer calls each id; a padded vocabulary has more, named after `missing`.

    Args:
        missing: with a place for the id, as `[PAD{}]`.
    """
    check_vocabulary(tokenizer, n_ids)
    known = {id: name for name, id in tokenizer.backend.get_vocab().items()}
    return [known.get(id, missing.format(id)) for id in range(n_ids)]


def copy_about(folder: Path, out: Path) -> None:
    """Copy what a model directory has beside its weights.

    Raises:
        ValueError: if a file is damaged.
    """
    for pattern in ABOUT:
        for file in folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                if file.suffix == ".json":
                    read_json(file)
                (out / file.name).write_bytes(file.read_bytes())
