"""GGUF: one file for llama.cpp and what is built on it, in 32, 16, 8 or 4 bits.

Blocks of 32 numbers of a row share a scale in q8_0 and q4_0. Vectors stay float32, as llama.cpp
wants them. It computes GELU by the approximation with tanh, from a table of float16 numbers.

Source: the format as the package `gguf` writes it; llama.cpp, `src/models/mpt.cpp`.
"""

import json
import math
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from mptbook.directory import template_of
from mptbook.export.source import described, place, token_names
from mptbook.export.verify import Written, engine
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.weights import finite, read_weights

DTYPES = ("f32", "bf16", "q8_0", "q4_0")
BLOCK = 32
NAMES = {  # llama.cpp's for our parts
    "wte": "token_embd",
    "wpe": "position_embd",
    "lm_head": "output",
    "norm_f": "output_norm",
    "norm_1": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "attn.q_ln": "attn_q_norm",
    "attn.k_ln": "attn_k_norm",
    "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
}


def write(folder: Path, out: Path, dtype: str) -> None:
    """Write a model directory's model as `model-DTYPE.gguf` into the folder `out`.

    Memory holds one tensor at a time.

    Raises:
        ValueError: for a field that llama.cpp passes over, a width that blocks do not divide, or
            if there is no tokenizer.
    """
    gguf = engine("gguf")
    model = described(folder, "gguf")
    config = model.config
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    if dtype.startswith("q"):
        for name in ("d_model", "mlp_width"):
            if getattr(config, name) % BLOCK:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, but {dtype} packs {BLOCK} numbers "
                    "together; choose f32 or bf16"
                )
    writer = gguf.GGUFWriter(out / f"model-{dtype}.gguf", "mpt")
    try:
        _describe(writer, gguf, config, kind)
        _add_vocabulary(writer, gguf, folder, config.vocab_size)
        weights = [(name, weight.shape) for name, weight in model.named_parameters()]
        for name, shape in weights:
            own = _kind(gguf, shape, kind)
            size = gguf.quant_shape_to_byte_shape(tuple(shape), own)
            n_bytes = math.prod(size)
            writer.add_tensor_info(_name(name), size, np.dtype(np.uint8), n_bytes, own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in _in_order(folder, model, [name for name, _ in weights]):
            own = _kind(gguf, weight.shape, kind)
            writer.write_tensor_data(gguf.quants.quantize(finite(name, weight).numpy(), own))
    finally:
        writer.close()


def greedy(out: Path, ids: list[int], new_tokens: int) -> Written:
    """What llama.cpp writes, the likeliest token at each place, as exactly as it can.

    It does not tell the log-probability of a token that ends within a character.
    """
    llama = engine("xllamacpp")
    (file,) = out.glob("*.gguf")
    settings = llama.CommonParams()
    settings.model.path = str(file)
    # Its default rounds keys and values to float16; fused attention does so in any case.
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_ctx = len(ids) + new_tokens + 1
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    server = llama.Server(settings)
    written: Written = []
    for _ in range(new_tokens):
        prompt = [*ids, *(token for token, _ in written)]
        question = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1}
        answer = _ask(server, "/completion", question | {"return_tokens": True})
        (token,) = answer["tokens"]
        told = [each["logprob"] for each in answer.get("completion_probabilities", ())]
        if told == [None]:  # how JSON writes a number that is none
            told = [math.nan]
        written.append((token, told[0] if told else None))
    return written


def _ask(server, path: str, question: dict) -> dict:
    """What llama.cpp's server, which listens on this machine only, answers."""
    data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, data, kind)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def _in_order(folder: Path, model: MPT, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights in the order in which they are announced; those that come early wait, mapped."""
    waiting: dict[str, Tensor] = {}
    wanted = iter(names)
    name = next(wanted)
    for found, weight in read_weights(folder, model):
        waiting[found] = weight
        while name in waiting:
            yield name, waiting.pop(name)
            name = next(wanted, "")


def _kind(gguf, shape, kind):
    return kind if len(shape) > 1 else gguf.GGMLQuantizationType.F32


def _name(name: str) -> str:
    block, part, leaf = place(name)
    return (f"blk.{block}." if block else "") + f"{NAMES[part]}.{leaf}"


def _describe(writer, gguf, config: MPTConfig, kind) -> None:
    """The fields of the shape, under llama.cpp's names."""
    attn = config.attn_config
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_max_alibi_bias(attn.alibi_bias_max if attn.alibi else 0.0)
    if attn.clip_qkv is not None:
        writer.add_clamp_kqv(attn.clip_qkv)
    types = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind.name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer, gguf, folder: Path, n_ids: int) -> None:
    """The tokenizer: byte-level BPE that splits texts as GPT-2's does, which llama.cpp calls mpt.

    llama.cpp does not bring texts into Unicode's NFC form, as MPT's tokenizer does.
    """
    tokenizer = Tokenizer.load(folder)
    about = json.loads(tokenizer.backend.to_str())
    split = about["pre_tokenizer"] or {}
    rules = split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True)
    kind = about["model"]["type"]
    if (*rules, kind) != ("ByteLevel", False, True, "BPE"):
        raise ValueError(
            f"{folder}/tokenizer.json splits texts by {split}, and their words by {kind}; "
            "llama.cpp would split them as GPT-2 does, so export to another target"
        )
    names = token_names(tokenizer, n_ids, "[PAD{}]")
    types = [
        gguf.TokenType.NORMAL if id < len(tokenizer) else gguf.TokenType.UNUSED
        for id in range(n_ids)
    ]
    for id, token in tokenizer.backend.get_added_tokens_decoder().items():
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("mpt")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(
        [m if isinstance(m, str) else " ".join(m) for m in about["model"]["merges"]]
    )
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    template = template_of(folder)
    if template is not None:
        writer.add_chat_template(template.source)
