"""The configuration of an MPT model: named sizes, and released `config.json` files in and out.

Field names are those of the released files. Sources: the configurations and model cards of
mosaicml/mpt-7b, -7b-8k, -7b-storywriter and -30b; llm-foundry's `configuration_mpt.py`.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

BACKENDS = ("auto", "reference", "sdpa", "products", "horizon", "flash", "flex")
NORMS = ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")


@dataclass(frozen=True)
class AttentionConfig:
    """What `attn_config` holds in a released file."""

    attn_type: str = "multihead_attention"  # or multiquery_attention, grouped_query_attention
    kv_n_heads: int | None = None  # key and value heads; None: as attn_type says
    attn_pdrop: float = 0.0
    attn_impl: str = "auto"  # a backend of `mptbook.model.attention`
    qk_ln: bool = False  # normalise queries and keys over the whole width
    clip_qkv: float | None = None  # largest absolute value of q, k and v
    softmax_scale: float | None = None  # None: 1 / sqrt(head width)
    attn_uses_sequence_id: bool = False  # keep the documents of a packed row apart
    alibi: bool = False
    alibi_bias_max: float = 8.0  # the flattest head loses 2 ** -alibi_bias_max a token


@dataclass(frozen=True)
class InitConfig:
    """What `init_config` holds in a released file; see `mptbook.model.init`."""

    name: str = "kaiming_normal_"
    fan_mode: str = "fan_in"
    init_nonlinearity: str = "relu"
    init_std: float | None = 0.02  # of baseline_, the plain normal
    init_div_is_residual: bool | float = True  # True: divide by sqrt(2 * n_layers)
    emb_init_std: float | None = None
    emb_init_uniform_lim: float | None = None


@dataclass(frozen=True)
class MPTConfig:
    """The shape of an MPT model. Defaults are MPT's style: ALiBi, no biases, a tied head.

    Raises:
        ValueError: if fields contradict each other; the message names a way out.
    """

    d_model: int = 2048
    n_heads: int = 16
    n_layers: int = 24
    expansion_ratio: float = 4  # width of the MLP over d_model
    max_seq_len: int = 2048  # tokens; with ALiBi a length trained for, not a limit
    vocab_size: int = 50_432
    emb_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    learned_pos_emb: bool = True  # ALiBi overrides it
    no_bias: bool = True
    norm_type: str = "low_precision_layernorm"
    norm_eps: float = 1e-5
    logit_scale: float | str | None = None  # a factor, or "inv_sqrt_d_model"
    tie_word_embeddings: bool = True
    attn_config: AttentionConfig = field(default_factory=lambda: AttentionConfig(alibi=True))
    init_config: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads: n_heads, fewer, or one."""
        attn = self.attn_config
        if attn.attn_type == "multiquery_attention":
            return 1
        return attn.kv_n_heads or self.n_heads

    @property
    def mlp_width(self) -> int:
        return int(self.expansion_ratio * self.d_model)

    @property
    def logit_factor(self) -> float:
        if self.logit_scale == "inv_sqrt_d_model":
            return self.d_model**-0.5
        return 1.0 if self.logit_scale is None else float(self.logit_scale)

    @property
    def has_positions(self) -> bool:
        """Whether there is a table of learned positions, which ends at `max_seq_len`."""
        return self.learned_pos_emb and not self.attn_config.alibi

    @classmethod
    def named(cls, name: str) -> Self:
        """A released size or one of the small ones: see `NAMED`."""
        if name not in NAMED:
            near = difflib.get_close_matches(name, NAMED, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} is not a named model ({', '.join(NAMED)}){hint}")
        return cls(**NAMED[name])

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; fields of its parts may be given by their own name."""
        own, parts = {f.name for f in fields(self)}, ("attn_config", "init_config")
        home = {f.name: part for part in parts for f in fields(getattr(self, part))}
        for key in list(changes):
            if part := home.get(key):
                inner = changes.get(part, getattr(self, part))
                changes[part] = replace(inner, **{key: changes.pop(key)})
            elif key not in own:
                raise ValueError(_unknown(key, own | home.keys()))
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, released: dict[str, Any]) -> Self:
        """The configuration that a released `config.json` describes.

        Accepts the files of the released models (remote code) and those of transformers' own
        `MptConfig`. Fields that say nothing about the function are dropped.

        Raises:
            ValueError: for a field that is unknown, naming the nearest known one, or that
                asks for something MPT models here do not have.
        """
        given = {RENAMED.get(key, key): value for key, value in released.items()}
        kind = given.pop("model_type", "mpt")
        if kind != "mpt":
            raise ValueError(f"model_type is {kind}; only mpt can be read")
        _refuse_unsupported(given)
        known = {f.name for f in fields(cls)}
        values = {}
        for key, value in given.items():
            if key in known:
                values[key] = value
            elif key not in WITHOUT_EFFECT | set(UNSUPPORTED):
                raise ValueError(_unknown(key, known))
        # What a file leaves out has the default of the library that wrote it, not ours:
        # llm-foundry, or transformers, which has its own name for the epsilon.
        native = "layer_norm_epsilon" in released
        values = {"no_bias": native, "vocab_size": 50_368} | values
        attn = {"alibi": native} | dict(given.get("attn_config") or {})
        values["attn_config"] = _attention_from_hf(attn)
        values["init_config"] = _part(InitConfig, dict(given.get("init_config") or {}))
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """What `config.json` says of this model, for mptbook, transformers and engines."""
        values = asdict(self)
        # transformers calls it so; both names are written, and both are read.
        values["layer_norm_epsilon"] = values["norm_eps"]
        attn = values["attn_config"]
        if attn["attn_impl"] in BACKENDS:
            attn["attn_impl"] = "torch"
        if attn["kv_n_heads"] is None:
            del attn["kv_n_heads"]  # released files have none either, and vLLM trips over it
        # transformers refuses 0.0 where it declares an integer, and 6 where it declares a float.
        for part in (values, attn):
            for name in ("expansion_ratio", "attn_pdrop", "alibi_bias_max"):
                if name in part and part[name] == int(part[name]):
                    part[name] = int(part[name])
            for name in ("logit_scale", "clip_qkv", "softmax_scale"):
                if isinstance(part.get(name), int):
                    part[name] = float(part[name])
        return {"model_type": "mpt", **values}


def _part(kind: type, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(kind)}
    for key in list(values):
        if key in WITHOUT_EFFECT:
            values.pop(key)
        elif key not in known:
            raise ValueError(_unknown(key, known))
    return kind(**values)


def _attention_from_hf(values: dict[str, Any]) -> AttentionConfig:
    _refuse_unsupported(values)
    values = {key: value for key, value in values.items() if key not in UNSUPPORTED}
    # Released files name the kernel of their time; ours is chosen by device and dtype.
    values["attn_impl"] = "auto"
    if values.get("attn_type") == "multihead_attention":
        values.pop("kv_n_heads", None)
    return _part(AttentionConfig, values)


def _unknown(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} is not a field of an MPT configuration{hint}"


def _refuse_unsupported(values: dict[str, Any]) -> None:
    for key, harmless in UNSUPPORTED.items():
        if key in values and values[key] not in harmless:
            raise ValueError(
                f"{key}={values[key]!r} is not supported; MPT models have {harmless[0]}"
            )


def _check(config: MPTConfig) -> None:
    attn = config.attn_config
    for name in ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on")
    width, heads = config.d_model, config.n_heads
    if width % heads:
        down = width - width % heads
        ways = f"{down} or {down + heads}" if down else f"{heads}"
        raise ValueError(f"d_model={width} does not split into n_heads={heads}; try d_model={ways}")
    types = ("multihead_attention", "multiquery_attention", "grouped_query_attention")
    kinds = ("norm_type", config.norm_type, NORMS), ("attn_type", attn.attn_type, types)
    for name, value, choices in (*kinds, ("attn_impl", attn.attn_impl, BACKENDS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    if attn.attn_type == "grouped_query_attention" and not attn.kv_n_heads:
        raise ValueError("grouped_query_attention needs kv_n_heads, a divisor of n_heads")
    if attn.attn_type == "multihead_attention" and config.kv_heads != heads:
        raise ValueError(f"kv_n_heads={attn.kv_n_heads} needs attn_type=grouped_query_attention")
    if heads % config.kv_heads:
        raise ValueError(
            f"kv_n_heads={config.kv_heads} does not divide n_heads={heads}; "
            "each key head serves the same number of query heads"
        )
    # Other programs take 0 for None.
    for name in ("softmax_scale", "clip_qkv", "alibi_bias_max"):
        value = getattr(attn, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0, or left out")
    scale = config.logit_scale
    if isinstance(scale, str) and scale != "inv_sqrt_d_model":
        raise ValueError(f"logit_scale is {scale!r}; it must be a number or inv_sqrt_d_model")


RENAMED = {"layer_norm_epsilon": "norm_eps"}
# Read and dropped: bookkeeping, the device of another day, caching (a choice of the caller).
WITHOUT_EFFECT = frozenset(
    """architectures auto_map dtype torch_dtype transformers_version use_cache init_device
    verbose tokenizer_name model_type initializer_range init_gain bos_token_id eos_token_id
    pad_token_id _name_or_path fused_qkv attn_config init_config return_dict
    output_hidden_states output_attentions is_encoder_decoder id2label label2id problem_type
    chunk_size_feed_forward use_pad_tok_in_ffn param_init_fn rope_theta rope_impl
    rope_dail_config rope_hf_config""".split()
)
# Read and refused unless the value is one of these, with which the field does nothing.
UNSUPPORTED = {
    "embedding_fraction": (1.0, 1),
    "prefix_lm": (False,),
    "rope": (False,),
    "nope": (False,),
    "qk_gn": (False,),
    "sliding_window_size": (-1,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "head_dim": (None,),
    "kv_dim": (None,),
    "attn_temperature_tuning": (None, {"floor_scale": 8192, "attn_scale": 0.0}),
    "attention_bias": (None,),
    "block_overrides": (None,),
    "ffn_config": ({"ffn_type": "mptmlp"}, {}, None),
    "fc_type": ("torch", None),
}

_SEVEN = {"d_model": 4096, "n_heads": 32, "n_layers": 32}
NAMED: dict[str, dict[str, Any]] = {
    "mpt-tiny": {
        "d_model": 256,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "vocab_size": 8192,
    },
    "mpt-125m": {"d_model": 768, "n_heads": 12, "n_layers": 12},
    "mpt-350m": {"d_model": 1024, "n_heads": 16, "n_layers": 24},
    "mpt-1b": {"d_model": 2048, "n_heads": 16, "n_layers": 24},
    "mpt-7b": _SEVEN,
    "mpt-7b-8k": _SEVEN | {"max_seq_len": 8192},
    # The announcement gives neither number; both are in the released file.
    "mpt-7b-storywriter": _SEVEN
    | {
        "max_seq_len": 65_536,
        "attn_config": AttentionConfig(alibi=True, alibi_bias_max=16, clip_qkv=6),
    },
    # 64 heads of 112, as released; llm-foundry's example file says 56, with as many parameters.
    "mpt-30b": {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192},
}
