"""CTranslate2's directory: `model.bin`, `config.json`, `vocabulary.json`.

Its own converter knows the name of the released code only, loads the model by transformers, which
passes over fields that CTranslate2 knows (see `mptbook.export.fields`), and passes over others.

With int8, look at the difference that `mptbook export` says. On a processor of AMD with AVX2 and
without VNNI, CTranslate2 4.8.5 is off by 10 nats for a random model, and by 1 where it is told to
take other products, by CT2_USE_MKL=1 in the environment. The file is right.
"""

import json
from pathlib import Path

import numpy as np
import torch

from mptbook.export.source import described, place, token_names
from mptbook.export.verify import Written, engine
from mptbook.tokenizer.tokenizer import END_OF_TEXT, Tokenizer
from mptbook.weights import finite, read_weights

DTYPES = ("float32", "int8", "float16", "bfloat16")
PLACES = {  # of a block's parts
    "norm_1": "self_attention/layer_norm",
    "attn.Wqkv": "self_attention/linear_0",
    "attn.out_proj": "self_attention/linear_1",
    "norm_2": "ffn/layer_norm",
    "ffn.up_proj": "ffn/linear_0",
    "ffn.down_proj": "ffn/linear_1",
    "wte": "embeddings",
    "wpe": "position_encodings",
    "lm_head": "projection",
    "norm_f": "layer_norm",
}


def write(folder: Path, out: Path, dtype: str) -> None:
    """Write a model directory's model into the folder `out`.

    The weights stay in the file while they are collected; int8 makes its numbers of them one
    tensor after the other.

    Raises:
        ValueError: for a field that CTranslate2 passes over, or if there is no tokenizer.
    """
    specs = engine("ctranslate2").specs
    model, tokenizer = described(folder, "ctranslate2"), Tokenizer.load(folder)
    config = model.config
    spec = specs.TransformerDecoderModelSpec.from_config(
        config.n_layers,
        config.n_heads,
        activation=specs.Activation.GELU,
        rms_norm=config.norm_type.endswith("rmsnorm"),
        alibi=config.attn_config.alibi,
        num_heads_kv=config.kv_heads if config.kv_heads < config.n_heads else None,
    )
    spec.decoder.scale_embeddings = False
    for name, weight in read_weights(folder, model):
        found = finite(name, weight, torch.float16 if dtype == "float16" else torch.float32)
        weight = found if weight.dtype == torch.float64 else weight  # which it does not know
        path, leaf = _place(name)
        owner = specs.model_spec.index_spec(spec.decoder, path)
        setattr(owner, leaf, weight)
        if leaf == "gamma" and config.no_bias and hasattr(owner, "beta"):
            owner.beta = torch.zeros_like(weight)
    if config.tie_word_embeddings:
        spec.decoder.projection.weight = spec.decoder.embeddings.weight
    spec.config.layer_norm_epsilon = config.norm_eps
    spec.config.unk_token = spec.config.bos_token = spec.config.eos_token = END_OF_TEXT
    spec.register_vocabulary(token_names(tokenizer, config.vocab_size, "<extra_id_{}>"))
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(out))


def greedy(out: Path, ids: list[int], new_tokens: int) -> Written:
    """What CTranslate2 writes, the likeliest token at each place."""
    ctranslate2 = engine("ctranslate2")
    # It sets the number of threads for all of the process, PyTorch included.
    how = {"compute_type": "default", "intra_threads": torch.get_num_threads()}
    generator = ctranslate2.Generator(str(out), device="cpu", **how)
    names = json.loads((out / "vocabulary.json").read_text(encoding="utf-8"))
    (answer,) = generator.generate_batch(
        [[names[token] for token in ids]],
        max_length=new_tokens,
        min_length=new_tokens,
        include_prompt_in_result=False,
        end_token=[],
    )
    tokens = answer.sequences_ids[0]
    # Its scores are sums over the answer; the likelihood of each token is read from the logits.
    whole = [[names[token] for token in [*ids, *tokens]]]
    logits = generator.forward_batch(whole, return_log_probs=True)
    logs = torch.as_tensor(np.array(logits))[0, len(ids) - 1 : -1]
    return [(token, float(log[token])) for token, log in zip(tokens, logs, strict=True)]


def _place(name: str) -> tuple[str, str]:
    """Where one of our weights belongs: the part, and the name there."""
    block, part, leaf = place(name)
    if "norm" in part:
        leaf = "gamma" if leaf == "weight" else "beta"
    path = f"layer_{block}/{PLACES[part]}" if block else PLACES[part]
    return path, "encodings" if part == "wpe" else leaf
