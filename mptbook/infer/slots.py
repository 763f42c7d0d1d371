"""Sequences that a model reads and writes side by side, each in a slot of one cache.

Dimensions in this file
    L   layers
    S   slots
    G   key and value heads
    T   tokens that a slot has room for
    K   width of a head
    V   vocabulary
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mptbook.infer.cache import windows_of
from mptbook.infer.decode import Cache, Decoder, is_plain
from mptbook.infer.emit import BF16_UNITS
from mptbook.infer.read import read
from mptbook.infer.views import Rows, Texts
from mptbook.model.mpt import MPT
from mptbook.model.precision import autocast, has_bf16

CacheDtype = Literal["float32", "bfloat16", "int8"]
CHUNK = 2048  # tokens read at once, so that what a layer needs besides does not grow
FAR = 1024  # tokens from which finding out what a head can leave out is worth it


class Slots:
    """A model, and room for the keys and values of several sequences.

    All room is taken at once; nothing moves or grows afterwards. On a CPU compiled loops read texts
    (`mptbook.infer.read`) and write tokens (`mptbook.infer.decode`); `MPT.forward` does both on a
    GPU, and for a model that is more than its weights, as one with adapters. Where a text begins a
    changed model is seen as it is.

    Args:
        model: in evaluation mode afterwards.
        n_slots: S.
        n_tokens: T.
        dtype: of what is kept. None: float32 where the model's weights are, else bfloat16. int8
            has a scale for each vector.

    Raises:
        ValueError: if there is no memory for them.
    """

    def __init__(
        self, model: MPT, n_slots: int, n_tokens: int, dtype: CacheDtype | None = None
    ) -> None:
        if n_slots < 1 or n_tokens < 1:
            raise ValueError(f"{n_slots} slots of {n_tokens} tokens; there must be one of each")
        self.model, self.n_slots, self.n_tokens = model.eval(), n_slots, n_tokens
        self.lengths = [0] * n_slots
        attn = model.transformer.blocks[0].attn
        self._packed = hasattr(attn.Wqkv, "packed")
        if dtype is None:
            gain = model.transformer.norm_f.weight
            whole = gain.dtype == torch.float32 and not self._packed
            dtype = "float32" if whole else "bfloat16"
        shape = model.config.n_layers, n_slots, attn.kv_heads, n_tokens, attn.width
        # Zeros, so that the memory is taken now and not while a request waits.
        try:
            self.keys = torch.zeros(shape, dtype=getattr(torch, dtype), device=model.device)
            self.values = torch.zeros_like(self.keys)
        except RuntimeError as error:
            raise ValueError(
                f"there is no memory for {n_slots} slots of {n_tokens:,} tokens; ask for fewer of "
                f"either ({str(error).splitlines()[0]})"
            ) from None
        scales = shape[:-1] if dtype == "int8" else (0, 0, 0, 0)
        self.key_scale = torch.zeros(scales, device=model.device)
        self.value_scale = torch.zeros_like(self.key_scale)
        self._decoder: Decoder | None = None  # where compiled loops compute what the model does
        self._dtype: torch.dtype | None = None  # of products, where they read texts too
        self._look()

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        kept = self.keys, self.values, self.key_scale, self.value_scale
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @torch.inference_mode()
    def read(self, slot: int, ids: Sequence[int], every: bool = False) -> Tensor:
        """Append tokens to a slot.

        Args:
            ids: at least one.
            every: logits after each of them, not only after the last.

        Returns:
            (V,) float32, or (len(ids), V).

        Raises:
            ValueError: if the slot has no room for them.
        """
        self._check_room(slot, len(ids))
        self._look()
        if len(ids) == 1 and self._decoder is not None:
            return self.decode([slot], ids) if every else self.decode([slot], ids)[0]
        found = []
        for start in range(0, len(ids), CHUNK):
            hidden = self._hidden([slot], [ids[start : start + CHUNK]], every)
            if every:
                found.append(self.model.logits(hidden[None])[0].float())
        return torch.cat(found) if every else self._logits(hidden)[0]

    @torch.inference_mode()
    def read_texts(self, slots: Sequence[int], texts: Sequence[Sequence[int]]) -> Tensor:
        """Read several texts in one pass, each into an empty slot of its own.

        Reading a weight and preparing it for a product takes as long for few tokens as for many:
        short texts are read faster together.

        Args:
            slots: which, no one twice.
            texts: ids of each, at least one.

        Returns:
            (len(slots), V) float32, after the last token of each.

        Raises:
            ValueError: if a slot is not empty, or has no room for its text.
        """
        for slot, text in zip(slots, texts, strict=True):
            if self.lengths[slot]:
                raise ValueError(f"slot {slot} holds {self.lengths[slot]} tokens; crop it to none")
            self._check_room(slot, len(text))
        self._look()
        return self._logits(self._hidden(slots, texts))

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> Tensor:
        """One more token in each of several slots; the weights are read once for all.

        Args:
            slots: which, no one twice.
            ids: the tokens.

        Returns:
            (len(slots), V) float32.

        Raises:
            ValueError: if a slot has no room for one more.
        """
        for slot in slots:
            self._check_room(slot, 1)
        lengths = [self.lengths[slot] for slot in slots]
        if 0 in lengths:
            self._look()
        if self._decoder is not None:
            logits = self._decoder(self._cache, slots, lengths, ids)
        else:
            logits = self._decode_padded(slots, lengths, ids)
        for slot in slots:
            self.lengths[slot] += 1
        return logits

    def crop(self, slot: int, length: int) -> None:
        """Forget all but the first tokens of a slot."""
        self.lengths[slot] = min(length, self.lengths[slot])

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Put the first tokens of one slot in the place of what another holds."""
        length = min(length, self.lengths[source])
        for kept in (self.keys, self.values, self.key_scale, self.value_scale):
            if kept.numel():
                kept[:, target, :, :length] = kept[:, source, :, :length]
        self.lengths[target] = length

    def _look(self) -> None:
        """Make the loops anew if the model has changed."""
        if self._decoder is None or not self._decoder.is_of(self.model):
            plain = is_plain(self.model)
            self._decoder = Decoder(self.model, self._windows()) if plain else None
            self._dtype = self._products() if plain else None

    def _products(self) -> torch.dtype | None:
        """What `read` computes products in; None for weights that it does not multiply."""
        block = self.model.transformer.blocks[0]
        layers = block.attn.Wqkv, block.attn.out_proj, block.ffn.up_proj, block.ffn.down_proj
        unpacked = [layer.weight.dtype for layer in layers if not hasattr(layer, "packed")]
        if any(dtype != torch.float32 for dtype in unpacked):
            return None
        units = BF16_UNITS and has_bf16(self.model.device)
        exact = unpacked or self.keys.dtype == torch.float32 or not units
        return torch.float32 if exact else torch.bfloat16

    @cached_property
    def _cache(self) -> Cache:
        bits = self.keys, self.values
        if self.keys.dtype == torch.bfloat16:
            bits = [kept.view(torch.uint16) for kept in bits]
        return Cache(*(each.numpy() for each in (*bits, self.key_scale, self.value_scale)))

    def _hidden(
        self, slots: Sequence[int], texts: Sequence[Sequence[int]], every: bool = False
    ) -> Tensor:
        """(N, D) float32, the last norm's output after the last token of each text.

        Args:
            texts: appended to the slots; several only to empty ones.
            every: after each token, (R, D).
        """
        lengths = [self.lengths[slot] for slot in slots]
        sizes = [len(text) for text in texts]
        if self._decoder is not None and self._dtype is not None:
            hidden = read(self._decoder, self._cache, slots, lengths, texts, self._dtype, every)
        else:
            device = self.model.device
            ids = torch.tensor([[token for text in texts for token in text]], device=device)
            documents = None
            if len(texts) > 1:
                of_token = torch.arange(len(texts)).repeat_interleave(torch.tensor(sizes))
                documents = of_token[None].to(device)
            hidden = self._forward(ids, documents, Texts(self, slots, lengths, sizes))[0]
            if not every:
                hidden = hidden[torch.tensor(sizes, device=device).cumsum(0) - 1]
        for slot, length, size in zip(slots, lengths, sizes, strict=True):
            self.lengths[slot] = length + size
        return hidden

    def _forward(self, *given: Any) -> Tensor:
        """`MPT.hidden`, in bfloat16 throughout where products with packed weights are and the cache
        holds no more: in float32, attention takes a third of the time of 512 tokens."""
        if not self._packed or self.keys.dtype == torch.float32:
            return self.model.hidden(*given)
        with autocast(self.model.device):
            return self.model.hidden(*given).float()

    def _logits(self, hidden: Tensor) -> Tensor:
        """(R, V) float32 of the (R, D) of the last norm; R is small."""
        if self._decoder is not None:
            return self._decoder.logits(hidden)
        return self.model.logits(hidden[None])[0].float()

    @torch.inference_mode()
    def _decode_padded(self, slots, lengths, ids) -> Tensor:
        device = self.model.device
        rows = Rows(self, slots, lengths)
        hidden = self._forward(torch.tensor(ids, device=device)[:, None], rows.documents, rows)
        return self.model.logits(hidden)[:, 0].float()

    def _windows(self) -> list[list[int]]:
        if self.n_tokens < FAR or not self.model.config.attn_config.alibi:
            return [[self.n_tokens] * self.keys.shape[2]] * len(self.keys)
        return windows_of(self.model)

    def _check_room(self, slot: int, new: int) -> None:
        if new < 1:
            raise ValueError("no tokens to read; give at least one, end-of-text for a new text")
        if self.lengths[slot] + new > self.n_tokens:
            raise ValueError(
                f"{self.lengths[slot]} tokens and {new} more, but a slot holds {self.n_tokens}; "
                "shorten the text or make larger slots"
            )
        config = self.model.config
        if config.has_positions and self.lengths[slot] + new > config.max_seq_len:
            raise ValueError(
                f"{self.lengths[slot] + new} tokens, but learned positions end at "
                f"max_seq_len={config.max_seq_len}; shorten the text, or use ALiBi"
            )
