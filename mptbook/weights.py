"""Weights in files: safetensors in and out, and the pickles of older releases in.

model.safetensors        above 5 GB model-00001-of-00007.safetensors and so on, with an index
pytorch_model.bin        likewise, in older releases
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mptbook.model.mpt import MPT

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
PARTS = "shard-*.safetensors"  # of a checkpoint of several processes


def read_weights(folder: Path, model: MPT) -> Iterator[tuple[str, Tensor]]:
    """Name and values of each weight of a model, one after the other.

    Args:
        folder: a model directory.
        model: the model whose weights they are to be; its own may be on "meta".

    Returns:
        Tensors in memory that may be the file itself: copy what you keep.

    Raises:
        FileNotFoundError: if the folder has no weights.
        ValueError: if they are not those of such a model; the message names the tensor and the
            shapes.
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    tied = model.config.tie_word_embeddings
    both: dict[str, Tensor] = {}  # of a tied head: some files hold it twice
    for file, stored, tensor in read_tensors(folder):
        name = stored.removeprefix("model.")  # Composer's
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(
                f"{stored} is of {tensor.dtype} in {file}; weights are float32, bfloat16, float16 "
                "or float64"
            )
        if tied and name in ("lm_head.weight", "transformer.wte.weight"):
            both[name] = tensor
        if not (tied and name == "lm_head.weight"):
            check_shape(stored, tensor, wanted.pop(name, None), file)
            yield name, tensor.contiguous()  # pickles may hold it transposed
    check_complete(folder, wanted)
    head, embedding = both.get("lm_head.weight"), both.get("transformer.wte.weight")
    if head is not None and not torch.equal(head.to(embedding), embedding):
        raise ValueError(
            f"{folder} has an lm_head.weight that differs from transformer.wte.weight, but its "
            "config.json ties them; write tie_word_embeddings: false there"
        )


def finite(name: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight in the dtype that another program is to have it in.

    Raises:
        ValueError: if a number of it is infinite or NaN there; the message names the weight.
    """
    found = weight.to(dtype)
    if not torch.isfinite(found).all():
        raise ValueError(
            f"{name} has numbers that are not finite in {dtype}, the largest of the model "
            f"{weight.abs().max():g}; take another dtype, or a model that is not damaged"
        )
    return found


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that steps change, by name; of a model with adapters only these are written."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def write_weights(
    described: Mapping[str, Tensor],
    folder: Path,
    max_shard_bytes: int,
    fetch: Callable[[list[str]], dict[str, Tensor]],
) -> None:
    """`model.safetensors`, or files of at most so many bytes and an index of them.

    Args:
        described: every weight by its name, if need be on "meta".
        fetch: gives the values of the weights of one file.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(dict(described), max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        write_tensors(fetch(names), folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tensors may be on any device.

    Raises:
        OSError: if it cannot be written, for want of room for example.
    """
    try:
        here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(here, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # the library's name for an OSError
        raise OSError(f"cannot write {file}: {error}") from None


def read_json(file: Path) -> dict:
    """The object that a JSON file holds.

    Raises:
        ValueError: if it holds anything else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it should be a JSON object")
    return values


def write_json(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _weight_files(folder: Path, wanted: Sequence[str]) -> list[Path]:
    for single in wanted:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
                raise ValueError(f"{index} has no weight_map of names and files; fetch it again")
            names = sorted(set(places.values()))
            files = [folder / Path(name).name for name in names]
            for file in (file for file in files if not file.is_file()):
                raise FileNotFoundError(f"{file} is missing, but {index} names it; fetch it")
            return files
    if any(folder.glob(PARTS)):
        raise FileNotFoundError(
            f"{folder} is a checkpoint of several processes; make a model directory of it: "
            f"mptbook consolidate {folder} --out DIR"
        )
    raise FileNotFoundError(f"{folder} has a config.json but neither of {' and '.join(wanted)}")


def read_tensors(
    folder: Path, files: Sequence[str] = WEIGHTS
) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and values of every tensor that a folder's weight files hold, as they lie there.

    Args:
        files: names of the file, or of the index of several; the first that is there is read.

    Raises:
        FileNotFoundError: if there are no weights, or a file of several is missing.
        ValueError: if a file is damaged.
    """
    for file in _weight_files(folder, files):
        for name, tensor in _tensors(file):
            yield file, name, tensor


def check_complete(folder: Path, lacking: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError if weights of a model, by name and shape, were not in its files."""
    if lacking:
        name, shape = next(iter(lacking.items()))
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(
            f"{folder} lacks {name} of shape {shape}{more}; the files are incomplete, or "
            "config.json describes another model"
        )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of one file, in memory that is the file itself."""
    if file.suffix == ".safetensors":
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is not a dict)
                    yield name, opened.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or write it again") from None
        return
    try:
        mmap = zipfile.is_zipfile(file)  # the format since PyTorch 1.6
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        weights = None
    if not isinstance(weights, dict) or not all(map(_is_weight, weights, weights.values())):
        raise ValueError(
            f"{file} is not a plain dictionary of tensors; nothing else is read from a pickle, "
            "so convert it to safetensors where you trust it"
        )
    for name, weight in weights.items():
        yield name, weight.detach()


def _is_weight(name: Any, weight: Any) -> bool:
    plain = isinstance(weight, Tensor) and weight.layout == torch.strided
    return isinstance(name, str) and plain and not weight.is_meta


def check_shape(name: str, tensor: Tensor, wanted: tuple[int, ...] | None, file: Path) -> None:
    """Raise a ValueError if a tensor of a file is not the one wanted; None: none of its name is."""
    shape = tuple(tensor.shape)
    if wanted is None:
        raise ValueError(
            f"{file} holds {name} of shape {shape}, which has no place in the model that "
            "config.json describes; check its n_layers, no_bias, alibi and tie_word_embeddings"
        )
    if shape != wanted:
        raise ValueError(
            f"{name} has the shape {shape} in {file}, but {wanted} in the model that config.json "
            "describes; one of the two is of another model"
        )
