"""Model directories: what stages exchange, in Hugging Face's layout.

    config.json              the shape, as `MPTConfig.to_hf` says it
    model.safetensors        the weights; above 5 GB, numbered shards and an index of them
    tokenizer.json           with tokenizer_config.json, so that transformers reads it too
    generation_config.json   which ids end and pad a text
    chat_template.jinja      of a finetuned model: how it reads conversations

Released checkpoints have the same layout, some with `pytorch_model.bin` for the weights.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer import chat
from mptbook.tokenizer.chat import ChatTemplate
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer
from mptbook.weights import read_json, read_weights, write_json, write_weights

# What a model directory may hold and still be replaced by `save_model`.
OURS = re.compile(
    r"(model|packed)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|chat_template\.jinja"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json"
)

ABOUT = "*.json", "*.jinja"  # what a directory has beside its weights


def load_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> MPT:
    """The model of a directory, in evaluation mode.

    Weights are read one tensor at a time into a model that has none yet, so memory never
    holds more than the model and the tensor that is being read.

    Args:
        path: a model directory, a run directory (its `model/` is meant), a checkpoint as it
            was released, or a hub name such as `mosaicml/mpt-7b`.
        dtype: of the weights; None keeps the dtype in which each one is stored.
        device: where the weights go.
        changes: fields of `MPTConfig` that shall differ, as `alibi_bias_max=16`.

    Raises:
        FileNotFoundError: if there is no configuration, or no weights.
        ValueError: if the configuration is not that of an MPT, or the weights do not fit it;
            the message names the tensor and the shapes.
        ConnectionError: if a hub name cannot be fetched.
    """
    folder = find_directory(path)
    with torch.device("meta"):
        model = MPT(read_config(folder).replace(**changes))
    for name, tensor in read_weights(folder, model):
        owner, _, leaf = name.rpartition(".")
        kept = tensor.to(device, dtype or tensor.dtype, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept))
    model.slopes = model.slopes.to(device)
    return model.eval()


def save_model(
    model: MPT,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    template: ChatTemplate | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model directory, or replace one.

    The files are written beside `path` and get their place by a rename, so that `path` never
    holds half a model.

    Args:
        tokenizer: None leaves the directory without one.
        template: of a model that was finetuned on conversations; it takes a tokenizer, too.
        max_shard_bytes: the weights are split into files of at most this size; a tensor that
            is larger has a file of its own.

    Raises:
        ValueError: if `path` exists and is not a model directory, or holds other files too.
    """
    with fresh_directory(path) as fresh:
        weights = model.state_dict()
        write_weights(
            weights, fresh, max_shard_bytes, lambda names: {name: weights[name] for name in names}
        )
        write_about(fresh, model.config, model.head.dtype, tokenizer, template)


def write_about(
    folder: Path,
    config: MPTConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None = None,
) -> None:
    """The files of a model directory that are not weights."""
    name = str(dtype).removeprefix("torch.")
    about = {"architectures": ["MPTForCausalLM"], "dtype": name, **config.to_hf()}
    write_json(folder / "config.json", about)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, folder, config.max_seq_len, template)


def require_absent(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if there is something where a command was told to write."""
    if Path(path).exists():
        raise ValueError(f"{path} is there already; choose another folder, or remove it")


@contextmanager
def fresh_directory(path: str | os.PathLike[str], replace: bool = True) -> Iterator[Path]:
    """A folder to write a model directory into, which gets the place of `path` at the end.

    What fails in between leaves nothing behind.

    Raises:
        ValueError: if `path` exists and `replace` is not set, or if it is not a model directory,
            or holds other files too.
    """
    folder = Path(path).resolve()
    if not replace:
        require_absent(path)
    _refuse_to_replace(folder, path)
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            fresh, replaced = Path(scratch, "fresh"), Path(scratch, "replaced")
            fresh.mkdir()
            yield fresh
            if folder.exists():
                folder.rename(replaced)
            try:
                fresh.rename(folder)
            except OSError:
                if replaced.exists():
                    replaced.rename(folder)
                raise
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # somebody else's files are in it by now
                parent.rmdir()
        raise


def read_config(folder: Path) -> MPTConfig:
    """The shape that the `config.json` of a model directory describes."""
    file = folder / "config.json"
    released = read_json(file)
    if released.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} has weights packed in fewer bits, which generate, ask, serve and evaluate "
            "read (mptbook.infer.load); for anything else take the model that it was made of"
        )
    return parse_config(file, released)


def parse_config(file: Path, released: dict[str, Any]) -> MPTConfig:
    """The shape that the content of a file describes; errors name the file."""
    released = {key: value for key, value in released.items() if key != "quantization_config"}
    try:
        config = MPTConfig.from_hf(released)
        check_values(config)
        epsilon = released.get("layer_norm_epsilon", config.norm_eps)
        if released.get("norm_eps", epsilon) != epsilon:
            raise ValueError(
                f"norm_eps is {released['norm_eps']}, but layer_norm_epsilon, which means the "
                f"same, is {epsilon}; write one of them"
            )
        return config
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def check_values(config: MPTConfig) -> None:
    """Raise a ValueError for a field without its type, or a number that cannot be meant."""
    for part in (config, config.attn_config, config.init_config):
        for each in fields(part):
            value = getattr(part, each.name)
            if isinstance(value, int | float) and not 0 <= value < 2**31:
                raise ValueError(f"{each.name} is {value}; it must be from 0 on, and below 2**31")
            try:
                TypeAdapter(each.type).validate_python(value, strict=True)
            except ValidationError:
                kind = each.type.__name__ if isinstance(each.type, type) else each.type
                raise ValueError(f"{each.name} is {value!r}; it must be {kind}") from None
    if config.mlp_width < 1:
        raise ValueError(f"expansion_ratio is {config.expansion_ratio}; an MLP needs a width")


def find_directory(path: str | os.PathLike[str]) -> Path:
    """The model directory that `path` means; see `load_model`."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = _from_hub(str(path))
    if not folder.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a model directory, a run directory, or a hub name "
            "such as mosaicml/mpt-7b"
        )
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{path} has no config.json; a model directory has one, a run directory has it in model/"
    )


def template_of(folder: Path) -> ChatTemplate | None:
    """The chat template of a model directory, or None if it has none."""
    try:
        return ChatTemplate.load(folder)
    except FileNotFoundError:
        return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*ABOUT, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an older release
            folder = Path(snapshot_download(name, allow_patterns=[*ABOUT, "*.bin"]))
    except OSError as error:  # the hub's own errors, and the network's, are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"{name} is no folder here, and the hub did not give it: {reason}"
        ) from error
    return folder


def _refuse_to_replace(folder: Path, path: str | os.PathLike[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{path} is a file; give the folder that is to hold the model")
    found = sorted(entry.name for entry in folder.iterdir())
    for name in found:
        if not OURS.fullmatch(name):
            raise ValueError(
                f"{path} holds {name}, which is no part of a model directory and would be lost; "
                "choose another folder"
            )
    if found and "config.json" not in found:
        raise ValueError(f"{path} is not a model directory (no config.json); choose another folder")


def _write_tokenizer(
    tokenizer: Tokenizer, folder: Path, max_seq_len: int, template: ChatTemplate | None
) -> None:
    tokenizer.save(folder / "tokenizer.json")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", about)
    ids: dict[str, int | list[int]] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text
    )
    if template is not None:
        (folder / chat.FILE).write_text(template.source, encoding="utf-8")
        ends = chat.stop_ids(template, tokenizer)
        if len(ends) > 1:
            ids["eos_token_id"] = ends
    write_json(folder / "generation_config.json", ids)
