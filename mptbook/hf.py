"""MPT as a model of the library transformers: its `generate`, pipelines, Trainer and PEFT.

Importing this file tells `AutoConfig` and `AutoModelForCausalLM` that "mpt" is ours: their own
`MptForCausalLM` passes over `alibi_bias_max`, `qk_ln`, `logit_scale` and more without a word.

Dimensions in this file
    B   batch
    Tq  tokens given now
    Tk  tokens in all, those of the cache first
    V   vocabulary
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from mptbook.directory import load_model, save_model
from mptbook.model.attention import slopes_of
from mptbook.model.config import MPTConfig
from mptbook.model.init import initialise
from mptbook.model.mpt import MPT

__all__ = ["HFConfig", "MPTForCausalLM", "load_model", "save_model"]

FIELDS = tuple(field.name for field in fields(MPTConfig))
# What transformers puts among the fields of a configuration for its own use.
OF_TRANSFORMERS = (
    "attn_implementation",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "torch_dtype",
)


class HFConfig(PreTrainedConfig):
    """The fields of `MPTConfig` as attributes, as transformers wants them.

    `attn_config` and `init_config` are plain dictionaries. `shape` is the `MPTConfig`; an
    unknown or unsupported field is refused when either is made.
    """

    model_type = "mpt"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        theirs = {
            key: kwargs.pop(key)
            for key in list(kwargs)
            if key in OF_TRANSFORMERS or key.startswith("_")
        }
        renamed = {self.attribute_map.get(key, key): value for key, value in kwargs.items()}
        released = MPTConfig.from_hf(renamed).to_hf()
        # Released files say false, from the day of their training; it made generation crawl.
        self.use_cache = True
        super().__post_init__(**theirs, **{key: released[key] for key in FIELDS})

    @classmethod
    def of(cls, config: MPTConfig, **kwargs: Any) -> Self:
        """The configuration of a model of this shape."""
        return cls(**config.to_hf(), **kwargs)

    @property
    def shape(self) -> MPTConfig:
        """The fields as they are now."""
        return MPTConfig.from_hf({key: getattr(self, key) for key in FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """With every field written out: a default that changes must not change old files."""
        return super().to_dict() | self.shape.to_hf()


class Held:
    """A cache of transformers as `MPT` asks for one: `extend` and `len`."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.n_tokens = int(cache.get_seq_length())

    def __len__(self) -> int:
        return self.n_tokens

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        n_keys = self.n_tokens + k.shape[2]
        keys, values = self.cache.update(k, v, layer)
        return [(keys[:, :, :n_keys], values[:, :, :n_keys])]  # a static cache has room to spare


class MPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`MPT` with the interface of transformers; its parameters have the released names.

    Args:
        config: the shape.
        model: an `MPT` of this shape, whose weights are then shared; None makes one.

    Attributes:
        mpt: the `MPT` that does the work, on the same weights.
    """

    config_class = HFConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: HFConfig, model: MPT | None = None) -> None:
        super().__init__(config)
        if model is None:
            shape = config.shape
            if config._attn_implementation == "eager":
                shape = shape.replace(attn_impl="reference")
            model = MPT(shape)
        self.transformer = model.transformer
        if config.tie_word_embeddings:
            # There is no such weight; transformers' own MPT writes it all the same.
            self._keys_to_ignore_on_load_unexpected = {r"^lm_head\.weight$"}
        else:
            self.lm_head = model.lm_head
        # Not a submodule: its parts are, and only so do parameters keep their names.
        self.__dict__["mpt"] = model
        self.post_init()
        self.is_built = True

    @classmethod
    def of(cls, model: MPT) -> Self:
        """The same model, on the same weights, with the interface of transformers."""
        wrapped = cls(HFConfig.of(model.config, dtype=model.head.dtype), model)
        return wrapped.train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        documents: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, the loss where there are labels, and the cache where one is used.

        Args:
            input_ids: (B, Tq) int64.
            attention_mask: (B, Tk); 0 hides a token, on whichever side it pads.
            labels: (B, Tq) int64, shifted here: label t is the target of token t - 1. -100
                costs nothing. The loss is the mean over the others.
            use_cache: None: as the configuration says, but not for training.
            documents: (B, Tk) int64, as for `MPT.forward`; or `position_ids`, which start
                again from 0 at each document of a packed row.
            logits_to_keep: how many positions, from the end, get logits; 0 means all.
        """
        position_ids = kwargs.pop("position_ids", None)
        _refuse_unknown(kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None and not self.training
        if self.mpt.recompute and torch.is_grad_enabled():
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        held = None if past_key_values is None else Held(past_key_values)
        n_held = 0 if held is None else len(held)
        if documents is None and position_ids is not None and n_held == 0:
            documents = (position_ids == 0).cumsum(dim=1).expand_as(input_ids)
        documents = _hide(documents, attention_mask, n_held + input_ids.shape[1])
        if self.mpt.slopes.device != input_ids.device:  # `mpt` is no submodule: it stayed behind
            self.mpt.slopes = slopes_of(self.mpt.config).to(input_ids.device)
        hidden = self.mpt.hidden(input_ids, documents, held)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.mpt.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )
        return output.to_tuple() if return_dict is False else output

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    @property
    def gradient_checkpointing(self) -> bool:
        """Switched by `gradient_checkpointing_enable`, under transformers' name for it."""
        return bool(self.mpt.recompute)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.mpt.recompute = int(enable)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Keeps the mask (B, Tk) where transformers would make one of four dimensions."""
        return attention_mask

    def _init_weights(self, module: nn.Module) -> None:
        if not getattr(self, "is_built", False):
            return  # `MPT` has filled its weights, or they will be read from a file
        names = [name for name, one in self.named_modules() if one is module]
        weights = dict(module.named_parameters(recurse=False))
        lacking = [key for key, w in weights.items() if not hasattr(w, "_is_hf_initialized")]
        if names and lacking:
            raise ValueError(
                f"the checkpoint lacks {names[0]}.{lacking[0]} of shape "
                f"{tuple(weights[lacking[0]].shape)}, which its config.json asks for"
            )
        if not names:  # a layer that transformers is about to put in
            initialise(module, self.mpt.config)


def _hide(documents: Tensor | None, mask: Tensor | None, n_keys: int) -> Tensor | None:
    """`documents` with padding as a document of its own; None where nothing is hidden.

    In a compiled graph a branch on the mask's values cannot be taken: there it always hides.
    """
    if mask is None:
        return documents
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has the shape {tuple(mask.shape)}; MPT reads (batch, tokens)"
        )
    if mask.shape[1] < n_keys:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} of {n_keys} tokens; it must cover those in "
            "the cache too"
        )
    mask = mask[:, :n_keys].bool()
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return documents
    if documents is None:
        return mask.long()
    return documents.masked_fill(~mask, -1)


OF_THE_LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in OF_THE_LOSS and value is not None and value is not False:
            raise TypeError(f"MPTForCausalLM has no use for {name}; leave it out")


@contextmanager
def bars_on_a_terminal_only() -> Iterator[None]:
    """No bars in logs and notebooks: transformers shows one for each model that it loads."""
    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


AutoConfig.register("mpt", HFConfig, exist_ok=True)
AutoModelForCausalLM.register(HFConfig, MPTForCausalLM, exist_ok=True)
