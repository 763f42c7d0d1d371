"""Small models of several kinds with random weights, as evaluation reads them."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mptbook.directory import save_model
from mptbook.eval.reader import Reader, load_reader
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.bpe import train_bpe

TEXTS = [
    "the cat sat on the mat. A dog ate the hat of the cat?\n",
    "yes no 1 2 3 4 5 6 7 8 9 0 A B",
]
WIDTH, HEADS, LAYERS, VOCABULARY = 24, 3, 2, 300

PEERS = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 40},  # rotary positions
    "gpt2": {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 96},  # learned
    "bloom": {"n_head": HEADS, "n_layer": LAYERS},  # ALiBi
}


def mpt_directory(folder, seed=0, **changes):
    """A model directory whose weights are large enough that its answers differ."""
    torch.manual_seed(seed)
    shape = {"d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "vocab_size": VOCABULARY}
    model = MPT(MPTConfig(**shape, max_seq_len=96).replace(**changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2) if weight.dim() > 1 else None
    save_model(model, folder, train_bpe(TEXTS, VOCABULARY))
    return folder


def mpt_reader(folder, **changes):
    return load_reader(mpt_directory(folder, **changes), precision="fp32")


def peer_reader(kind):
    """A model of another family, with the same tokenizer."""
    torch.manual_seed(1)
    shape = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    config = transformers.AutoConfig.for_model(
        kind, **(shape if kind != "gpt2" else {}), vocab_size=VOCABULARY, **PEERS[kind]
    )
    config.bos_token_id = config.eos_token_id = 0
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2) if weight.dim() > 1 else None
    backend = train_bpe(TEXTS, VOCABULARY).backend
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    return Reader(model, tokenizer, "fp32")
