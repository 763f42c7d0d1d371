"""A small model whose directory the tests of exports write, far from the start of training."""

from pathlib import Path

import torch

from mptbook import save_model
from mptbook.export import verify
from mptbook.export.command import Export
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

SHAPE = {"d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 128, "vocab_size": 320}
PROMPT = list(range(3, 3 + 48))
# Fields of a shape by which another model is meant than one like MPT-7B.
UNUSUAL = {
    "alibi": {"alibi": False},
    "learned_pos_emb": {"alibi": False, "learned_pos_emb": False},
    "alibi_bias_max": {"alibi_bias_max": 2},
    "kv_n_heads": {"attn_type": "grouped_query_attention", "kv_n_heads": 2},
    "qk_ln": {"qk_ln": True},
    "clip_qkv": {"clip_qkv": 0.75},
    "softmax_scale": {"softmax_scale": 0.5},
    "no_bias": {"no_bias": False},
    "norm_type": {"norm_type": "rmsnorm"},
    "norm_eps": {"norm_eps": 0.05},
    "logit_scale": {"logit_scale": 0.5},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "expansion_ratio": {"expansion_ratio": 2},
}


def make(path, dtype=torch.float32, **fields):
    """Write a model directory with a tokenizer; weights so large that every field shows."""
    torch.manual_seed(0)
    model = MPT(MPTConfig(**SHAPE).replace(**fields))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    tokenizer = train_bpe(["the cat sat on the mat, 12 times\n"] * 5, 290)
    save_model(model.to(dtype), path, tokenizer)
    return path


def verify_model_of_width(home, width):
    """Compare the model that lies in a folder of its width with some tokens."""
    verify.compared(Path(home, f"{width}"), PROMPT, [(5, None)] * 4)


def export_model_of_width(target, home, width):
    """Export the model that lies in a folder of its width, and let no engine read it."""
    out = Path(home, f"{target}-{width}")
    arguments = {"model": f"{home}/{width}", "to": target, "out": str(out), "verify": False}
    Export(**arguments).run()
