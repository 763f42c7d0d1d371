"""FasterTransformer's folder: a file of plain numbers for each weight, and `config.ini`.

Weights lie transposed, as (inputs, outputs), one file for each GPU that shares a layer. Biases are
always read, so a model without them gets zeros.

Source: llm-foundry, `scripts/inference/convert_hf_mpt_to_ft.py`; FasterTransformer,
`examples/pytorch/gpt/utils/huggingface_gpt_convert.py`.
"""

import configparser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mptbook.export.source import described, place
from mptbook.model.config import MPTConfig
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import finite, read_weights

DTYPES = ("fp16", "fp32")
KINDS = {"fp16": np.float16, "fp32": np.float32}
NAMES = {
    "wte": "wte",
    "lm_head": "lm_head",
    "norm_f": "final_layernorm",
    "norm_1": "input_layernorm",
    "attn.Wqkv": "attention.query_key_value",
    "attn.out_proj": "attention.dense",
    "norm_2": "post_attention_layernorm",
    "ffn.up_proj": "mlp.dense_h_to_4h",
    "ffn.down_proj": "mlp.dense_4h_to_h",
}
BY_INPUTS = ("attn.out_proj", "ffn.down_proj")  # GPUs share these by their inputs
BY_OUTPUTS = ("attn.Wqkv", "ffn.up_proj")  # and these by their outputs


def write(folder: Path, out: Path, dtype: str, gpus: int = 1) -> None:
    """Write a model directory's model into `out/N-gpu`, one tensor in memory at a time.

    Args:
        dtype: fp16 or fp32.
        gpus: that share each layer.

    Raises:
        ValueError: for a field that FasterTransformer passes over, if the GPUs cannot share the
            heads, or if there is no tokenizer.
    """
    model = described(folder, "fastertransformer")
    config = model.config
    if config.n_heads % gpus or config.mlp_width % gpus:
        raise ValueError(
            f"{gpus} GPUs cannot share n_heads={config.n_heads} and {config.mlp_width} numbers of "
            "an MLP evenly; take a divisor of both"
        )
    home = out / f"{gpus}-gpu"
    home.mkdir()
    _write_ini(home, config, dtype, gpus, Tokenizer.load(folder).end_of_text)
    for name, weight in read_weights(folder, model):
        finite(name, weight, torch.float16 if dtype == "fp16" else torch.float32)
        part, leaf, file = _place(name)
        for number, values in enumerate(_shares(part, leaf, weight, gpus)):
            _file(home, file, part, leaf, number).write_bytes(_bytes(values, dtype))
        if config.no_bias and leaf == "weight" and part not in ("wte", "lm_head"):
            n_outputs = weight.shape[0]
            for number, values in enumerate(_shares(part, "bias", torch.zeros(n_outputs), gpus)):
                _file(home, file, part, "bias", number).write_bytes(_bytes(values, dtype))


def read_back(folder: Path, out: Path) -> float:
    """The largest difference between a weight of a model directory and what `write` wrote of it.

    Raises:
        ValueError: if a file holds more or fewer numbers than its weight, or some are not finite.
    """
    (home,) = out.glob("*-gpu")
    ini = configparser.ConfigParser()
    ini.read(home / "config.ini")
    gpus, kind = int(ini["gpt"]["tensor_para_size"]), KINDS[ini["gpt"]["weight_data_type"]]
    model = described(folder, "fastertransformer")
    worst = 0.0
    for name, weight in read_weights(folder, model):
        part, leaf, start = _place(name)
        for number, expected in enumerate(_shares(part, leaf, weight, gpus)):
            file = _file(home, start, part, leaf, number)
            found = torch.from_numpy(np.fromfile(file, kind)).float()
            if found.numel() != expected.numel():
                raise ValueError(
                    f"{file} holds {found.numel()} numbers, its weight has {expected.numel()}"
                )
            if not torch.isfinite(found).all():
                raise ValueError(f"{file} holds numbers that are not finite; write it again")
            worst = max(worst, float((found - expected.float().flatten()).abs().max()))
    return worst


def _place(name: str) -> tuple[str, str, str]:
    """Of one of our weights: the part, weight or bias, and how its file's name begins."""
    block, part, leaf = place(name)
    return part, leaf, (f"model.layers.{block}." if block else "model.") + NAMES[part]


def _file(home: Path, start: str, part: str, leaf: str, number: int) -> Path:
    shared = part in BY_OUTPUTS or (part in BY_INPUTS and leaf == "weight")
    if part == "wte":
        return home / f"{start}.bin"
    return home / (f"{start}.{leaf}.{number}.bin" if shared else f"{start}.{leaf}.bin")


def _shares(part: str, leaf: str, weight: Tensor, gpus: int) -> list[Tensor]:
    """What each GPU holds of a weight: all of it in a list of one, where they don't share it."""
    if part == "attn.Wqkv":
        # (3 x outputs, inputs) to (inputs, 3, outputs): every GPU has its heads' q, k and v.
        three = weight.unflatten(0, (3, -1))
        return [*(three.movedim(-1, 0) if leaf == "weight" else three).chunk(gpus, -1)]
    if part in BY_OUTPUTS:
        return [*weight.T.chunk(gpus, -1)] if leaf == "weight" else [*weight.chunk(gpus)]
    if part in BY_INPUTS and leaf == "weight":
        return [*weight.T.chunk(gpus, 0)]
    return [weight]


def _bytes(values: Tensor, dtype: str) -> bytes:
    return values.float().numpy().astype(KINDS[dtype]).tobytes()


def _write_ini(home: Path, config: MPTConfig, dtype: str, gpus: int, end_of_text: int) -> None:
    ini = configparser.ConfigParser()
    ini["gpt"] = {
        "model_name": "mpt",
        "head_num": config.n_heads,
        "size_per_head": config.head_width,
        "inter_size": config.mlp_width,
        "max_pos_seq_len": config.max_seq_len,
        "num_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "start_id": end_of_text,
        "end_id": end_of_text,
        "weight_data_type": dtype,
        "tensor_para_size": gpus,
        "layernorm_eps": config.norm_eps,
        "has_positional_encoding": False,
        "use_attention_linear_bias": True,
    }
    with (home / "config.ini").open("w") as file:
        ini.write(file)
