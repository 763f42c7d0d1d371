"""What a model costs, computed from its configuration alone: parameters, FLOPs, bytes, days.

No model is built, so MPT-30B is planned as quickly as the smallest one.

Dimensions in this file
    D   width of the residual stream;  F  of the MLP
    G   width of all key heads together; D unless heads are grouped
    L   layers
    V   vocabulary
    T   tokens in a row

Sources: llm-foundry's FLOP count (`modeling_mpt.py`) and its table of peak rates, taken from
NVIDIA's data sheets (composer's `speed_monitor.py`).
"""

import difflib
from dataclasses import dataclass

from mptbook.model.config import MPTConfig

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class GPU:
    """What a plan must know of a device."""

    memory_bytes: int
    peak_flops: float  # FLOPs per second in bfloat16, dense; float16 where there is no bfloat16


GIB = 2**30
GPUS = {
    "T4": GPU(16 * GIB, 65e12),
    "L4": GPU(24 * GIB, 121e12),
    "A100-40GB": GPU(40 * GIB, 312e12),
    "A100-80GB": GPU(80 * GIB, 312e12),
    "H100-80GB": GPU(80 * GIB, 989.5e12),
    "H200-141GB": GPU(141 * GIB, 989.5e12),
}


def gpu_named(name: str) -> str:
    """The key of `GPUS` that is meant: `h100-80` is H100-80GB.

    Raises:
        ValueError: if there is none, naming the nearest one.
    """
    keys = {key.lower(): key for key in GPUS}
    keys |= {key.removesuffix("gb"): full for key, full in keys.items()}
    if found := keys.get(name.lower()):
        return found
    near = difflib.get_close_matches(name.lower(), keys, n=1, cutoff=0.5)
    hint = f"; did you mean {keys[near[0]]}?" if near else ""
    raise ValueError(f"gpu is {name!r}; it must be one of {', '.join(GPUS)}{hint}")


def parameters(config: MPTConfig) -> dict[str, int]:
    """How many numbers each part of the model learns, biases counted with their part.

    Returns:
        `embedding`, `positions`, `attention`, `mlp`, `norms`, `head` and their `total`.
        A tied head is 0: its numbers are those of the embedding.
    """
    d_model, n_layers = config.d_model, config.n_layers
    d_keys = config.kv_heads * config.head_width
    d_qkv = d_model + 2 * d_keys
    biased = not config.no_bias
    in_norm = 1 + (biased and not config.norm_type.endswith("rmsnorm"))  # numbers per channel
    normed = 2 * d_model  # channels in a layer: before attention and before the MLP
    if config.attn_config.qk_ln:
        normed += d_model + d_keys
    parts = {
        "embedding": config.vocab_size * d_model,
        "positions": config.max_seq_len * d_model if config.has_positions else 0,
        "attention": n_layers * (d_qkv * (d_model + biased) + d_model * (d_model + biased)),
        "mlp": n_layers * (2 * d_model * config.mlp_width + biased * (config.mlp_width + d_model)),
        "norms": in_norm * (n_layers * normed + d_model),
        "head": 0 if config.tie_word_embeddings else config.vocab_size * d_model,
    }
    return parts | {"total": sum(parts.values())}


def flops_per_token(config: MPTConfig, row_tokens: int) -> int:
    """FLOPs to train on one token of a row of `row_tokens`: 6 N + 12 L D T.

    Each of the N parameters is used once in the forward pass, in one multiplication and one
    addition; the backward pass costs twice the forward pass. Scores and weighted sum of
    attention take another 4 D T FLOPs a layer forwards.

    This is llm-foundry's count, so that its published MFU can be compared with ours. It
    counts the full square of scores, of which the causal mask needs half, and the lookup of
    learned positions as if it were a product; it leaves out norms, the softmax and GELU, and
    the forward pass that is run again when activations are recomputed.
    """
    attention = 12 * config.n_layers * config.d_model * row_tokens
    return 6 * parameters(config)["total"] + attention


def mfu(
    config: MPTConfig, tokens_per_second_per_gpu: float, row_tokens: int, peak_flops: float
) -> float:
    """Share, 0 to 1, of a GPU's peak rate that goes into the FLOPs the model needs.

    Args:
        tokens_per_second_per_gpu: training throughput, divided by the number of GPUs.
        row_tokens: T.
        peak_flops: of one GPU, per second; see `GPUS`.
    """
    return flops_per_token(config, row_tokens) * tokens_per_second_per_gpu / peak_flops


def days(
    config: MPTConfig, tokens: float, row_tokens: int, n_gpus: int, flops_per_second: float
) -> float:
    """Days to train on `tokens`.

    Args:
        row_tokens: T.
        flops_per_second: what one GPU sustains: its peak rate times an MFU.
    """
    seconds = tokens * flops_per_token(config, row_tokens) / (n_gpus * flops_per_second)
    return seconds / SECONDS_PER_DAY


def weight_bytes(config: MPTConfig, bits: float = 16) -> int:
    """Bytes of all weights at `bits` each, rounded up."""
    return -int(-parameters(config)["total"] * bits // 8)


def cache_bytes_per_token(config: MPTConfig, bits: int = 16) -> int:
    """Bytes of the keys and values that one token leaves in the cache, over all layers."""
    return 2 * config.n_layers * config.kv_heads * config.head_width * bits // 8


STATE_BYTES = {"lion": 4, "adamw": 8}  # a momentum; a momentum and a second moment


def training_bytes_per_parameter(optimizer: str) -> int:
    """Bytes that training keeps for each weight: itself, its gradient, the optimizer's state.

    All are float32, as under autocast; activations come on top. FSDP divides them by the
    number of GPUs.

    Raises:
        ValueError: if the optimizer is not one of `STATE_BYTES`.
    """
    if optimizer not in STATE_BYTES:
        raise ValueError(f"optimizer is {optimizer!r}; it must be one of {', '.join(STATE_BYTES)}")
    return 4 + 4 + STATE_BYTES[optimizer]
