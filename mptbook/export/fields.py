"""What each reader of MPT knows of it, and what it would pass over without a word.

Everything that computes an MPT model knows MPT-7B: ALiBi whose flattest head loses 2 ** -8 a
token, as many key heads as query heads, no biases, a tied head. A field that says something else
is honoured by some and ignored by others, which then answer differently and say nothing.

Read, and every field run against `MPT`: transformers 5.23, `models/mpt`; llama.cpp,
`src/models/mpt.cpp`; CTranslate2 4.8, `specs/transformer_spec.py`; our ONNX graph. Read only:
vLLM 0.28, `model_executor/models/mpt.py`, and what FasterTransformer is fed with,
llm-foundry's `scripts/inference/convert_hf_mpt_to_ft.py`.
"""

from typing import Any

from mptbook.model.config import MPTConfig

EVERY = frozenset(
    """alibi alibi_bias_max kv_n_heads qk_ln clip_qkv softmax_scale no_bias norm_type norm_eps
    logit_scale tie_word_embeddings expansion_ratio learned_pos_emb""".split()
)
HONOURED = {
    "hf": frozenset("clip_qkv softmax_scale norm_eps tie_word_embeddings".split()),
    "vllm": frozenset("alibi_bias_max clip_qkv qk_ln no_bias expansion_ratio".split()),
    "onnx": EVERY,
    # llama.cpp has norms of queries and keys for MPT, and ends with a failed assertion in them.
    "gguf": EVERY - {"softmax_scale", "norm_type", "logit_scale", "qk_ln"},
    "ctranslate2": frozenset(
        "alibi kv_n_heads no_bias norm_type norm_eps tie_word_embeddings expansion_ratio".split()
    ),
    "fastertransformer": frozenset("no_bias norm_eps expansion_ratio tie_word_embeddings".split()),
}
WHOLE = {"vllm": ("alibi_bias_max", "expansion_ratio")}  # numbers that must be whole


def unusual(config: MPTConfig) -> dict[str, tuple[Any, Any]]:
    """Fields with which a model answers otherwise than one like MPT-7B: their value and MPT-7B's.

    Dropout, initialisation and `max_seq_len` are not among them: they say how a model is trained.
    """
    attn = config.attn_config
    scale = config.head_width**-0.5
    values = {
        "alibi": (attn.alibi, True),
        "learned_pos_emb": (config.learned_pos_emb or attn.alibi, True),
        "alibi_bias_max": (attn.alibi_bias_max if attn.alibi else 8, 8),
        "kv_n_heads": (config.kv_heads, config.n_heads),
        "qk_ln": (attn.qk_ln, False),
        "clip_qkv": (attn.clip_qkv, None),
        "softmax_scale": (attn.softmax_scale or scale, scale),
        "no_bias": (config.no_bias, True),
        # The precision of a norm is how it is computed, not what.
        "norm_type": (config.norm_type.removeprefix("low_precision_"), "layernorm"),
        "norm_eps": (config.norm_eps, 1e-5),
        "logit_scale": (config.logit_factor, 1.0),
        "tie_word_embeddings": (config.tie_word_embeddings, True),
        "expansion_ratio": (config.expansion_ratio, 4),
    }
    return {name: both for name, both in values.items() if both[0] != both[1]}


def refuse(config: MPTConfig, target: str) -> None:
    """Raise a ValueError for the fields that the readers of `target` pass over, or refuse."""
    found = unusual(config)
    unknown, broken = _lost(found, target)
    lost = unknown or broken
    if not lost:
        return
    given = " and ".join(f"{name}={found[name][0]}" for name in lost)
    taken = " and ".join(f"{name}={found[name][1]}" for name in lost)
    instead = f" and would compute {taken} instead" if unknown else ", only whole numbers"
    can = [other for other in HONOURED if not any(_lost(found, other))]
    raise ValueError(
        f"{target} cannot express {given}{instead}; export to {' or '.join(can)}, or serve it with "
        "mptbook"
    )


def _lost(found: dict[str, tuple[Any, Any]], target: str) -> tuple[list[str], list[str]]:
    """Of unusual fields, those that a target does not know, and those that are fractions to it."""
    unknown = [name for name in found if name not in HONOURED[target]]
    return unknown, [name for name in WHOLE.get(target, ()) if name in found and found[name][0] % 1]
