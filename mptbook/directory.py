"""Model directories: what stages exchange, in Hugging Face's layout.

    config.json              the shape, as `MPTConfig.to_hf` says it
    model.safetensors        the weights; above 5 GB, numbered shards and an index of them
    tokenizer.json           with tokenizer_config.json, so that transformers reads it too
    generation_config.json   which ids end and pad a text

Released checkpoints have the same layout, some with `pytorch_model.bin` for the weights.
"""

import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
# What a model directory may hold and still be replaced by `save_model`.
OURS = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|chat_template\.jinja|(config|generation_config|tokenizer"
    r"|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json"
)


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
    _fill(model, folder, dtype, device)
    model.slopes = model.slopes.to(device)
    return model.eval()


def save_model(
    model: MPT,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model directory, or replace one.

    The files are written beside `path` and get their place by a rename, so that `path` never
    holds half a model.

    Args:
        tokenizer: None leaves the directory without one.
        max_shard_bytes: the weights are split into files of at most this size; a tensor that
            is larger has a file of its own.

    Raises:
        ValueError: if `path` exists and is not a model directory, or holds other files too.
    """
    folder = Path(path).resolve()
    _refuse_to_replace(folder, path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh, replaced = Path(scratch, "fresh"), Path(scratch, "replaced")
        fresh.mkdir()
        _write_weights(model.state_dict(), fresh, max_shard_bytes)
        dtype = str(model.head.dtype).removeprefix("torch.")
        about = {"architectures": ["MPTForCausalLM"], "dtype": dtype, **model.config.to_hf()}
        _write_json(fresh / "config.json", about)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, fresh, model.config.max_seq_len)
        if folder.exists():
            folder.rename(replaced)
        try:
            fresh.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise


def read_config(folder: Path) -> MPTConfig:
    """The shape that the `config.json` of a model directory describes."""
    file = folder / "config.json"
    released = _read_json(file)
    try:
        return MPTConfig.from_hf(released)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


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


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an older release
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    except OSError as error:  # the hub's own errors, and the network's, are OSErrors
        reason = str(error).strip().splitlines()[0]
        raise ConnectionError(
            f"{name} is no folder here, and the hub did not give it: {reason}"
        ) from error
    return folder


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: if it cannot be written, for want of room for example.
    """
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # the library's name for an OSError
        raise OSError(f"cannot write {file}: {error}") from None


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights."""
    for single in WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(_read_json(index)["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
            for file in (file for file in files if not file.is_file()):
                raise FileNotFoundError(f"{file} is missing, but {index} names it; fetch it")
            return files
    raise FileNotFoundError(f"{folder} has a config.json but neither of {' and '.join(WEIGHTS)}")


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of one file, in memory that is the file itself: copy what you keep."""
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                    yield name, opened.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or write it again") from None
        return
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        weights = None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(
            f"{file} is not a plain dictionary of tensors; nothing else is read from a pickle, "
            "so convert it to safetensors where you trust it"
        )
    yield from weights.items()


def _fill(model: MPT, folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> None:
    """Give each weight of a model on "meta" its values."""
    wanted = dict(model.named_parameters())
    spare_head = None
    for file in _shards(folder):
        for stored, tensor in _tensors(file):
            name = stored.removeprefix("model.")  # Composer's
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                spare_head = tensor
                continue
            _check(stored, tensor, wanted.pop(name, None), file)
            kept = tensor.to(device, dtype or tensor.dtype, copy=True)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(kept))
    if wanted:
        name, weight = next(iter(wanted.items()))
        more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        raise ValueError(
            f"{folder} lacks {name} of shape {tuple(weight.shape)}{more}; the files are "
            "incomplete, or config.json describes another model"
        )
    if spare_head is not None and not torch.equal(spare_head.to(model.head), model.head):
        raise ValueError(
            f"{folder} has an lm_head.weight that differs from transformer.wte.weight, but its "
            "config.json ties them; write tie_word_embeddings: false there"
        )


def _check(name: str, tensor: Tensor, weight: Tensor | None, file: Path) -> None:
    shape = tuple(tensor.shape)
    if weight is None:
        raise ValueError(
            f"{file} holds {name} of shape {shape}, which has no place in the model that "
            "config.json describes; check its n_layers, no_bias, alibi and tie_word_embeddings"
        )
    if shape != tuple(weight.shape):
        raise ValueError(
            f"{name} has the shape {shape} in {file}, but {tuple(weight.shape)} in the model "
            "that config.json describes; one of the two is of another model"
        )


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


def _write_weights(weights: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].cpu().contiguous() for name in names}
        write_tensors(shard, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
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
    _write_json(folder / "tokenizer_config.json", about)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    _write_json(folder / "generation_config.json", ids)


def _read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it should be a JSON object")
    return values


def _write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
