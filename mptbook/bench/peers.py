"""The models of transformers that mptbook is compared with, in mptbook's sizes.

Dimensions in this file
    B   batch
    T   tokens of a row
    V   vocabulary
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT

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
    if name == MPT_PEER:
        from transformers import MptConfig, MptForCausalLM

        peer = MptForCausalLM(
            MptConfig(
                d_model=config.d_model,
                n_heads=config.n_heads,
                n_layers=config.n_layers,
                vocab_size=config.vocab_size,
                max_seq_len=config.max_seq_len,
            )
        )
    elif name == LLAMA:
        from transformers import LlamaConfig, LlamaForCausalLM

        peer = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.d_model,
                intermediate_size=8 * round(config.d_model / 3),
                num_attention_heads=config.n_heads,
                num_hidden_layers=config.n_layers,
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_seq_len,
                tie_word_embeddings=True,
            )
        )
    elif name == GPT2:
        from transformers import GPT2Config, GPT2LMHeadModel

        peer = GPT2LMHeadModel(
            GPT2Config(
                n_embd=config.d_model,
                n_head=config.n_heads,
                n_layer=config.n_layers,
                vocab_size=config.vocab_size,
                n_positions=config.max_seq_len,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,  # the default is an id that these vocabularies do not have
                eos_token_id=None,
            )
        )
    else:
        raise ValueError(f"{name!r} is not a contestant; there are {', '.join((OURS, *PEERS))}")
    return Peer(peer, config)
