"""The MPT model: a decoder-only transformer, from token ids to logits.

Dimensions in this file
    B   batch
    Tq  tokens given now
    Tk  tokens in all, those of the cache first; Tq without a cache
    D   width of the residual stream
    V   vocabulary

Source: MosaicML NLP Team, "Introducing MPT-7B", 2023; parameter names as in its checkpoints.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mptbook.model.attention import Attention, KeyValueCache, slopes_of
from mptbook.model.config import MPTConfig
from mptbook.model.init import initialise
from mptbook.model.norms import Norm


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.d_model, config.mlp_width, bias=not config.no_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.d_model, bias=not config.no_bias)
        self.down_proj.is_residual = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Block(nn.Module):
    """Attention and MLP, each reading a normed stream and adding to it."""

    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        norm = config.norm_type, config.d_model, config.norm_eps, not config.no_bias
        self.norm_1 = Norm(*norm)
        self.attn = Attention(config, layer)
        self.norm_2 = Norm(*norm)
        self.ffn = MLP(config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        x: Tensor,
        slopes: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x = x + self.dropout(self.attn(self.norm_1(x), slopes, documents, cache))
        return x + self.dropout(self.ffn(self.norm_2(x)))


class Transformer(nn.Module):
    """Embeddings, blocks, final norm: everything below the head."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        if config.has_positions:
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.emb_pdrop)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_f = Norm(config.norm_type, config.d_model, config.norm_eps, not config.no_bias)


class MPT(nn.Module):
    """An MPT model. `model(ids)` gives logits; its state dict has the released names.

    Args:
        config: the shape.

    Attributes:
        recompute: of every so many blocks one keeps no activations, and runs forward again in
            the backward pass; 1 is all blocks (slower by a third), 0 none.
    """

    def __init__(self, config: MPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = 0
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch would fill every weight, only to be filled again
            self.transformer = Transformer(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        with torch.device("cpu"):  # also while the weights are only described
            self.register_buffer("slopes", slopes_of(config), persistent=False)
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self, config)

    def _apply(self, fn, recurse=True):
        """What `.to()`, `.cuda()` and `.bfloat16()` do; the slopes stay float32 whatever they say.

        In bfloat16 a slope keeps 8 bits and positions above 256 run together.
        """
        super()._apply(fn, recurse)
        with torch.device("cpu"):
            slopes = slopes_of(self.config)
        self.slopes = slopes.to(self.slopes.device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.slopes.device

    @property
    def head(self) -> nn.Parameter:
        """(V, D): the weight that turns the last norm's output into logits."""
        owner = self.transformer.wte if self.config.tie_word_embeddings else self.lm_head
        return owner.weight

    def forward(
        self, ids: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits of the next token at every given position.

        Args:
            ids: (B, Tq) int64.
            documents: (B, Tk) int64. A token sees only tokens of its own document, which
                keeps packed documents apart and hides padding. None: all are one document.
            cache: keys and values of the tokens before these; extended in place.

        Returns:
            (B, Tq, V), float32 or the autocast dtype.

        Raises:
            ValueError: if `ids` has the wrong shape, or is longer than a table of learned
                positions.
            IndexError: from PyTorch, on a CPU, if an id is outside the vocabulary.
        """
        return self.logits(self.hidden(ids, documents, cache))

    def hidden(
        self, ids: Tensor, documents: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """(B, Tq, D): the output of the last norm; arguments as for `forward`."""
        if ids.dim() != 2:
            raise ValueError(
                f"ids have the shape {tuple(ids.shape)}; the model reads (batch, tokens)"
            )
        transformer = self.transformer
        x = transformer.wte(ids)
        if self.config.has_positions:
            n_keys = ids.shape[1] + (len(cache) if cache is not None else 0)
            x = x + transformer.wpe(self._positions(ids, n_keys, documents))
        x = transformer.dropout(x)
        # A cache would be extended once more by a second forward.
        every = self.recompute if cache is None and torch.is_grad_enabled() else 0
        for number, block in enumerate(transformer.blocks):
            if every and number % every == 0:
                x = checkpoint(block, x, self.slopes, documents, cache, use_reentrant=False)
            else:
                x = block(x, self.slopes, documents, cache)
        return transformer.norm_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) from the (B, T, D) of `hidden`."""
        logits = F.linear(hidden, self.head)
        factor = self.config.logit_factor
        return logits if factor == 1 else logits * factor

    def loss(self, ids: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Sum over all targets of minus the log-probability of each, in nats.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64; -100 costs nothing.
            documents: (B, T) int64, as for `forward`.

        Returns:
            A float32 scalar. The logits of all tokens are never in memory at once.
        """
        hidden = self.hidden(ids, documents).flatten(0, 1)
        sum_of_losses = importlib.import_module("mptbook.model.loss").linear_cross_entropy
        return sum_of_losses(hidden, self.head, targets.flatten(), self.config.logit_factor)

    def _positions(self, ids: Tensor, n_keys: int, documents: Tensor | None) -> Tensor:
        """(B or 1, Tq): how many tokens of the same document lie before each token."""
        position = torch.arange(n_keys, device=ids.device)[None]  # (1, Tk)
        if documents is not None:
            changed = torch.ones_like(documents, dtype=torch.bool)
            changed[:, 1:] = documents[:, 1:] != documents[:, :-1]
            start = torch.where(changed, position, 0).cummax(dim=1).values
            position = position - start
        position = position[:, n_keys - ids.shape[1] :]
        if n_keys > self.config.max_seq_len and int(position.max()) >= self.config.max_seq_len:
            raise ValueError(
                f"{int(position.max()) + 1} tokens, but learned positions end at "
                f"max_seq_len={self.config.max_seq_len}; shorten the text, or use ALiBi"
            )
        return position
