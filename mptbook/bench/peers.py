"""The models of transformers that mptbook is compared with, in mptbook's sizes.

Dimensions in this file
    B   batch
    T   tokens of a row
    V   vocabulary
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision, autocast
from mptbook.train.loop import StepLog

OURS = "mptbook"
MPT_PEER, LLAMA, GPT2 = "transformers' MPT", "transformers' LLaMA", "transformers' GPT-2"
PEERS = (MPT_PEER, LLAMA, GPT2)


class Peer(nn.Module):
    """A causal model of transformers with the interface of `MPT` that training needs."""

    def __init__(self, model: nn.Module, config: MPTConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, V)."""
        return self.model(input_ids=ids, use_cache=False).logits

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.parameters()).device

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Sum of nats over all targets, (B, T) int64; as transformers' own loss, in float32."""
        logits = self(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def make_model(name: str, config: MPTConfig) -> nn.Module:
    """`MPT`, or the peer called `name` with the width, depth, heads and vocabulary of `config`.

    Embeddings are tied, dropout is 0, and what else a peer has is as its configuration sets it
    by default. LLaMA's MLP has three matrices where the others have two, so it is two thirds
    as wide: 8/3 of the model's width, rounded to a multiple of 8.

    Raises:
        ValueError: for another name.
    """
    if name == OURS:
        return MPT(config)
    kind, fields = _fields(name, config)
    return Peer(kind(kind.config_class(vocab_size=config.vocab_size, **fields)), config)


def _fields(name: str, config: MPTConfig) -> tuple[type[nn.Module], dict]:
    """transformers' class for a peer, and the fields that give it the shape of `config`.

    Not by AutoModelForCausalLM: that one gives mptbook's own once mptbook.hf is imported.
    """
    import transformers

    more: dict = {}
    if name == MPT_PEER:
        kind = transformers.MptForCausalLM
        names = "d_model", "n_heads", "n_layers", "max_seq_len"
    elif name == LLAMA:
        kind = transformers.LlamaForCausalLM
        names = "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"
        more = {"intermediate_size": 8 * round(config.d_model / 3), "tie_word_embeddings": True}
    elif name == GPT2:
        kind = transformers.GPT2LMHeadModel
        names = "n_embd", "n_head", "n_layer", "n_positions"
        more = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        more |= {"bos_token_id": None, "eos_token_id": None}  # by default outside the vocabulary
    else:
        raise ValueError(f"{name!r} is not a contestant; there are {', '.join((OURS, *PEERS))}")
    shape = config.d_model, config.n_heads, config.n_layers, config.max_seq_len
    return kind, more | dict(zip(names, shape, strict=True))


def plain_steps(
    model: Peer,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    clip: float,
    precision: Precision = "auto",
) -> Iterator[StepLog]:
    """Train as a short program of a user's own would; yield a log after each step.

    Args:
        batches: (inputs, targets), int64 (B, T) each.
        schedule: learning rate for a step number, counted from 0.
        clip: largest gradient norm allowed.
        precision: of products.
    """
    device = model.device
    computing = autocast(device, precision)
    for step, (x, y) in enumerate(batches):
        model.train()
        with computing:
            loss = model.loss(x.to(device), y.to(device)) / y.numel()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        lr = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        yield StepLog(step + 1, loss.item(), norm.item(), lr, y.numel())
