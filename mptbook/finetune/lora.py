"""LoRA: train two thin matrices beside a frozen one, and add their product to it in the end.

A layer W x becomes W x + (alpha / r) B A x, with A (r, in) and B (out, r). B starts at zero, so
that nothing changes at first; only A and B have gradients and an optimizer's state. The library
peft puts the two in, and reads what is saved here.

Source: Hu et al., "LoRA", arXiv:2106.09685.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from pydantic_settings import CliPositionalArg
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mptbook.directory import find_directory, load_model, require_absent, save_model
from mptbook.fsdp import place
from mptbook.model.mpt import MPT
from mptbook.settings import RunSettings
from mptbook.tokenizer.chat import FILE, ChatTemplate
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import read_json, write_tensors

LAYERS = "Wqkv", "out_proj", "up_proj", "down_proj"  # all matrices of a block
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names of weights in files of peft


class Lora(BaseModel):
    """Adapters to train instead of the weights."""

    model_config = ConfigDict(extra="forbid")

    rank: NonNegativeInt = Field(0, description="of the adapters; 0: train all weights instead")
    alpha: float = Field(16.0, gt=0, description="over rank, what adapters are multiplied with")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what adapters read")
    layers: list[str] = Field(list(LAYERS), description="which matrices of a block have them")


def add_adapters(model: MPT, lora: Lora) -> None:
    """Put adapters beside layers of a model, in place; nothing else of it is trained any more.

    Raises:
        ValueError: if a layer is unknown, or peft is not installed.
    """
    unknown = sorted(set(lora.layers) - set(LAYERS))
    if unknown or not lora.layers:
        raise ValueError(
            f"lora.layers has {', '.join(unknown) or 'nothing'}; a block has {', '.join(LAYERS)}"
        )
    _inject(
        model,
        _peft().LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=sorted(lora.layers),
            task_type="CAUSAL_LM",
        ),
    )


@torch.no_grad()
def initialise_adapters(model: MPT, seed: int = 0) -> None:
    """Fill A as peft does, but by a seed of its own, and B with zeros.

    Whole matrices are filled on the CPU, of which each process takes its part: every number of
    processes begins with the same adapters.
    """
    chance = torch.Generator().manual_seed(seed)
    for _, layer in _adapted(model):
        a, b = _matrices(layer)
        place(a, nn.init.kaiming_uniform_(torch.empty(a.shape), math.sqrt(5), generator=chance))
        place(b, torch.zeros(b.shape))


def adapter_weights(model: MPT) -> dict[str, Tensor]:
    """A and B of each layer by the names that peft's files have, whole and on the CPU.

    Where several processes hold parts of them, all must call this at once.

    Raises:
        ValueError: if the model has no adapters.
    """
    found = {}
    for name, layer in _adapted(model):
        for leaf, weight in zip("AB", _matrices(layer), strict=True):
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            found[f"{PREFIX}{name}.lora_{leaf}.weight"] = whole.detach().cpu()
    if not found:
        raise ValueError("the model has no adapters; add_adapters gives it some")
    return found


def write_adapters(
    model: MPT,
    weights: dict[str, Tensor],
    folder: Path,
    base: str,
    template: ChatTemplate | None = None,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as peft reads them.

    Args:
        weights: from `adapter_weights`.
        base: what the adapters belong to, for people and for peft: a directory or hub name.
        template: how the adapters taught the model to read conversations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, folder / WEIGHTS)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    if template is not None:
        (folder / FILE).write_text(template.source, encoding="utf-8")


@torch.no_grad()
def load_adapters(model: MPT, folder: str | Path) -> None:
    """Put the adapters of a folder into a model, in place.

    Raises:
        FileNotFoundError: if the folder has no adapters.
        ValueError: if they are no LoRA, or of another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}; a run with lora.rank has it in adapter/"
        )
    about = read_json(folder / CONFIG)
    if about.get("peft_type") != "LORA":
        raise ValueError(f"{folder} holds adapters of the kind {about.get('peft_type')}, not LORA")
    _inject(model, _peft().LoraConfig.from_pretrained(str(folder)))
    try:
        stored = load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}); write it again") from None
    for name, layer in _adapted(model):
        for leaf, weight in zip("AB", _matrices(layer), strict=True):
            key = f"{PREFIX}{name}.lora_{leaf}.weight"
            shape = tuple(stored[key].shape) if key in stored else "missing"
            if shape != tuple(weight.shape):
                raise ValueError(
                    f"{key} is {shape} in {folder}, and {tuple(weight.shape)} in the model; the "
                    f"adapters belong to {about.get('base_model_name_or_path')}"
                )
            weight.copy_(stored.pop(key))
    if stored:
        raise ValueError(
            f"{folder} holds {next(iter(stored))}, which has no place in the model; the adapters "
            f"belong to {about.get('base_model_name_or_path')}"
        )


@torch.no_grad()
def merge(model: MPT) -> None:
    """Add the adapters' products to the weights, in place: a plain model again, all trainable."""
    for name, layer in list(_adapted(model)):
        layer.merge()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


class Merge(RunSettings):
    """Make a model directory of a model and its adapters: `mptbook merge ADAPTER --out DIR`."""

    adapter: CliPositionalArg[Path] = Field(description="folder that a run or peft wrote")
    out: Path = Field(description="model directory to write")
    model: str = Field("", description="what they belong to; none: as the adapters say")

    def run(self) -> None:
        require_absent(self.out)
        base = self.model or read_json(_about(self.adapter)).get("base_model_name_or_path")
        folder = find_directory(str(base))
        model = load_model(folder)
        load_adapters(model, self.adapter)
        merge(model)
        having = [place for place in (self.adapter, folder) if (place / FILE).is_file()]
        template = ChatTemplate.load(having[0]) if having else None
        save_model(model, self.out, Tokenizer.load(folder), template=template)
        print(f"model directory: {self.out}")


def _about(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; a run with lora.rank has adapter/")
    return folder / CONFIG


def _adapted(model: MPT) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _inject(model: MPT, config: Any) -> None:
    if any(True for _ in _adapted(model)):
        raise ValueError("the model has adapters already; merge them first")
    _peft().inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(
            "adapters take the library peft, which is not here; pip install 'mptbook[finetune]'"
        ) from None
    return peft
