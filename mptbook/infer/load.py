"""Models to write with: model directories, also of packed weights, in and out.

A directory of packed weights has Hugging Face's layout but for two things. `config.json` says how
they are packed, in `quantization_config`. And they lie in `packed.safetensors`, where other
programs do not look, and refuse the directory instead of misreading it: a weight `NAME.weight` as
`NAME.packed` and `NAME.scale`, see `mptbook.infer.quantize`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from mptbook.directory import (
    find_directory,
    fresh_directory,
    load_model,
    parse_config,
    read_config,
    template_of,
    write_about,
)
from mptbook.infer.quantize import (
    GROUP,
    PARTS,
    Bits,
    is_packed,
    pack,
    packed_layer,
    packed_like,
    relative_error,
)
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import (
    check_complete,
    check_shape,
    finite,
    read_json,
    read_tensors,
    read_weights,
    write_json,
    write_tensors,
)

# `Bits` as a setting: a command line knows words only.
BitsSetting = Annotated[
    Bits, BeforeValidator(lambda given: int(given) if str(given).isdecimal() else given)
]
PACKED = "packed.safetensors"
RANGES = {8: (-127, 128), 4: (0, 256)}  # of the numbers stored
SHARD_BYTES = 1_000_000_000  # of a file of packed weights; all of it is in memory once


def load(
    path: str | os.PathLike[str],
    bits: Bits | None = None,
    device: str | torch.device = "cpu",
) -> MPT:
    """The model of a directory, ready to write.

    Weights are read and packed one after the other: memory never holds more than the model and
    the tensor that is being read.

    Args:
        path: as for `mptbook.directory.load_model`; also a directory of packed weights.
        bits: pack the weights, see `mptbook.infer.quantize.pack`. None: as they are stored, but
            on a CPU bfloat16 is widened in products where the processor has no units for it, and
            of several dtypes in one model all but bfloat16 become float32.
        device: where the weights go.

    Raises:
        ValueError: as `load_model`; or if packed weights are asked for in other bits.
    """
    folder = find_directory(path)
    about = read_json(folder / "config.json")
    how = about.get("quantization_config")
    if how is not None:
        return _load_packed(folder, about, how, bits, device)
    dtypes = _dtypes(folder)
    widened = str(device) == "cpu" and torch.bfloat16 in dtypes
    if bits is None and len(dtypes) == 1 and not widened:
        return load_model(folder, device=device)
    with torch.device("meta"):
        model = MPT(read_config(folder))
    for name, tensor in read_weights(folder, model):
        if is_packed(name) and (bits or tensor.dtype == torch.bfloat16):
            packed, scale = _packed(name, tensor, bits or 16)
            _replace(model, name, packed.to(device), scale, device)
        else:
            _fill(model, name, tensor.to(device, torch.float32, copy=True))
    return _ready(model, device)


def is_packed_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a model directory, or a run, holds packed weights; for paths as of `load`."""
    return read_json(find_directory(path) / "config.json").get("quantization_config") is not None


def save_packed(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    bits: Bits,
    look: Callable[[str, float], None] | None = None,
) -> None:
    """Write a model directory of packed weights, reading the weights one after the other.

    Args:
        path: a model directory whose weights are not packed.
        out: the new directory; it gets its place when all of it is written, and read back.
        bits: 8 or 4.
        look: see `mptbook.infer.quantize.quantize`; it is told of what the new files hold.

    Raises:
        ValueError: see `pack`; also if `out` exists, or if files hold other weights than those.
    """
    folder = find_directory(path)
    if is_packed_directory(folder):
        raise ValueError(f"{path} has packed weights already; pack the model that it was made of")
    config = read_config(folder)
    with torch.device("meta"):
        model = MPT(config)
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    template = template_of(folder)
    with fresh_directory(out, replace=False) as fresh:
        _write_shards(_stored_tensors(read_weights(folder, model), bits), fresh)
        for name, error in _read_back(read_weights(folder, model), fresh, bits):
            if look is not None:
                look(name, error)
        write_about(fresh, config, torch.float32, tokenizer, template)
        about = read_json(fresh / "config.json")
        how = {"quant_method": "mptbook", "bits": bits, "group": GROUP}
        write_json(fresh / "config.json", about | {"quantization_config": how})


def random_model(config: MPTConfig, bits: Bits, seed: int = 0) -> MPT:
    """A model of random packed weights, made in the memory that it takes and no more.

    For measuring: it writes nonsense, at the speed of a trained one.
    """
    with torch.device("meta"):
        model = MPT(config)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in [*model.named_parameters()]:
        if not is_packed(name):
            fill = torch.ones if name.endswith("weight") else torch.zeros
            _fill(model, name, fill(weight.shape))
            continue
        with torch.device("cpu"):
            packed, scale = packed_like(torch.empty(1).expand(weight.shape), bits)
        if bits == 16:
            packed.uniform_(-0.03, 0.03, generator=generator)
        else:
            packed.random_(*RANGES[bits], generator=generator)
            scale.fill_(0.03 / 2 ** (bits - 1))
        _replace(model, name, packed, scale, "cpu")
    return _ready(model, "cpu")


def weight_bytes(model: nn.Module) -> int:
    """Memory that the weights of a model take, scales included."""
    seen = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


def _load_packed(folder: Path, about: dict, how: Any, bits: Bits | None, device) -> MPT:
    if not isinstance(how, dict) or how.get("quant_method") != "mptbook":
        raise ValueError(
            f"{folder}/config.json has the quantization_config {how}; only what `mptbook export "
            "--to int8` or int4 wrote can be read"
        )
    stored = how.get("bits")
    if (stored, how.get("group")) not in ((8, GROUP), (4, GROUP)):
        raise ValueError(
            f"{folder}/config.json has the quantization_config {how}; bits are 8 or 4, and groups "
            f"of {GROUP}; fetch or write the directory again"
        )
    if bits not in (None, stored):
        raise ValueError(
            f"{folder} has weights of {stored} bits, and {bits} are asked for; pack the model that "
            "it was made of"
        )
    with torch.device("meta"):
        model = MPT(parse_config(folder / "config.json", about))
        wanted = {}
        for name, weight in [*model.named_parameters()]:
            if is_packed(name):
                packed, scale = packed_like(weight, stored)
                _replace(model, name, packed, scale, "meta")
                wanted |= zip(_parts(name, stored), (packed, scale), strict=True)
            else:
                wanted[name] = weight
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    for file, name, tensor in read_tensors(folder, (PACKED,)):
        check_shape(name, tensor, shapes.pop(name, None), file)
        if tensor.dtype != wanted[name].dtype:
            raise ValueError(
                f"{name} is of {tensor.dtype} in {file}, and weights of {stored} bits have "
                f"{wanted[name].dtype} there; fetch or write the directory again"
            )
        owner, _, leaf = name.rpartition(".")
        kept = tensor.to(device, copy=True)
        module = model.get_submodule(owner)
        setattr(module, leaf, kept if leaf in module._buffers else nn.Parameter(kept, False))
    check_complete(folder, shapes)
    return _ready(model, device)


def _packed(name: str, weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor | None]:
    try:
        return pack(weight, bits)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _stored_tensors(weights, bits) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        if is_packed(name):
            yield from zip(_parts(name, bits), _packed(name, weight, bits), strict=True)
        else:
            yield name, finite(name, weight)


def _read_back(weights, folder: Path, bits: Bits) -> Iterator[tuple[str, float]]:
    """Name and error of each packed weight, as the files in a folder hold it."""
    stored = {name: tensor for _, name, tensor in read_tensors(folder, (PACKED,))}
    for name, weight in weights:
        if is_packed(name):
            yield name, relative_error(weight, *(stored[part] for part in _parts(name, bits)))
        elif not torch.equal(stored[name], weight.float()):
            raise ValueError(f"the new files hold another {name} than the model; write them again")


def _parts(name: str, bits: Bits) -> list[str]:
    return [name.removesuffix("weight") + part for part in PARTS[bits]]


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    """Files of about SHARD_BYTES, and the index of them."""
    files: list[list[str]] = []
    kept: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal kept, size
        write_tensors(kept, folder / f"{len(files)}.part")
        files.append([*kept])
        kept, size = {}, 0

    for name, tensor in tensors:
        kept[name] = tensor.clone()  # what was read may be the file itself
        size += tensor.numel() * tensor.element_size()
        total += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            flush()
    if kept:
        flush()
    names = {}
    for number, each in enumerate(files):
        name = f"packed-{number + 1:05}-of-{len(files):05}.safetensors"
        name = name if len(files) > 1 else PACKED
        (folder / f"{number}.part").rename(folder / name)
        names |= dict.fromkeys(each, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        write_json(folder / f"{PACKED}.index.json", index)


def _replace(model: MPT, name: str, packed: Tensor, scale: Tensor | None, device) -> None:
    owner = name.removesuffix(".weight")
    scale = None if scale is None else scale.to(device)
    model.set_submodule(owner, packed_layer(model.get_submodule(owner), packed, scale))


def _fill(model: MPT, name: str, values: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


def _dtypes(folder: Path) -> set[torch.dtype]:
    """Those of the weights in the files.

    Raises:
        ValueError: if there are none.
    """
    found = {tensor.dtype for _, _, tensor in read_tensors(folder)}
    if not found:
        raise ValueError(f"the files in {folder} hold no weight; fetch them again")
    return found


def _ready(model: MPT, device) -> MPT:
    model.slopes = model.slopes.to(device)
    return model.eval()
