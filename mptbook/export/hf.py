"""A directory for transformers' own MPT, and for vLLM up to 0.28, which reads the same files.

A model directory of ours is one already. What an export adds is that the fields are looked at
first (see `mptbook.export.fields`), another dtype, and the names that these readers look for.
"""

from pathlib import Path

import torch

from mptbook.export.source import copy_about, described
from mptbook.export.verify import Written
from mptbook.model.config import MPTConfig
from mptbook.weights import finite, read_json, read_weights, write_json, write_weights

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 2_000_000_000  # in memory once, in the new dtype


def write(folder: Path, out: Path, dtype: str, target: str = "hf") -> None:
    """Copy a model directory into the folder `out`, its weights in `dtype`.

    Raises:
        ValueError: for a field that the readers of `target`, hf or vllm, pass over.
    """
    model = described(folder, target)
    kind = getattr(torch, dtype)
    weights = {name: weight.to(kind) for name, weight in model.named_parameters()}

    def fetch(names: list[str]) -> dict[str, torch.Tensor]:
        wanted = set(names)
        return {n: finite(n, w, kind) for n, w in read_weights(folder, model) if n in wanted}

    write_weights(weights, out, SHARD_BYTES, fetch)
    copy_about(folder, out)
    # Of a released directory: code that is not copied, and the dtype of its weights.
    given = read_json(folder / "config.json")
    kept = {key: value for key, value in given.items() if key not in ("auto_map", "torch_dtype")}
    about = {"architectures": ["MptForCausalLM"], "dtype": dtype}
    write_json(out / "config.json", kept | _accepted(model.config).to_hf() | about)


def _accepted(config: MPTConfig) -> MPTConfig:
    """The same function in the words that these readers accept.

    vLLM asks for one norm_type, whose precision is its own affair, and for no kv_n_heads; dropout,
    which is of training, must be a whole number for transformers.
    """
    changes = {"attn_type": "multihead_attention", "kv_n_heads": None, "attn_pdrop": 0}
    return config.replace(norm_type="low_precision_layernorm", **changes)


def read_config(out: Path) -> None:
    """Have transformers read the configuration.

    Raises:
        ValueError: if it refuses.
    """
    from transformers import MptConfig

    try:
        MptConfig.from_pretrained(out, local_files_only=True)
    except Exception as error:  # its checks have errors of their own
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers does not accept the configuration: {reason}") from error


@torch.inference_mode()
def greedy(out: Path, ids: list[int], new_tokens: int) -> Written:
    """What transformers' own MPT writes, with its cache, the likeliest token at each place."""
    from transformers import MptForCausalLM

    from mptbook.hf import bars_on_a_terminal_only

    read_config(out)
    with bars_on_a_terminal_only():
        model = MptForCausalLM.from_pretrained(out, local_files_only=True).eval()
    # Not by `generate`, which does what generation_config.json says besides.
    past, given, written = None, ids, []
    for _ in range(new_tokens):
        answer = model(torch.tensor([given]), past_key_values=past, use_cache=True)
        past = answer.past_key_values
        log = answer.logits[0, -1].float().log_softmax(-1)
        given = [int(log.argmax())]
        written.append((given[0], float(log[given[0]])))
    return written
