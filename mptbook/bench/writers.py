"""Models of random weights that write: ours, and those of other libraries in the same shape.

Each is made by a function that a `mptbook.bench.workers.Worker` calls in a process of its own,
and answers `seconds(sequences, prompt_tokens, new_tokens)`: how long it takes to read so many
prompts and to write so many tokens to each, the likeliest at each place.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mptbook.bench.clients import write_random
from mptbook.bench.measure import process_bytes
from mptbook.infer.engine import Engine
from mptbook.infer.load import random_model, weight_bytes
from mptbook.infer.quantize import Bits
from mptbook.infer.request import Request
from mptbook.infer.slots import CHUNK, Slots
from mptbook.model.config import MPTConfig
from mptbook.model.precision import has_bf16
from mptbook.tokenizer.bpe import train_bpe

Seconds = Callable[..., float]
SLOTS = 8  # of llama.cpp; more sequences than that wait for each other
READ_BYTES = 400_000_000  # far more than a cache holds


class AnyIds:
    """Stands for a tokenizer where texts do not matter."""

    def __init__(self, n_ids: int) -> None:
        self.n_ids = n_ids

    def __len__(self) -> int:
        return self.n_ids

    def decode(self, ids) -> str:
        return "." * len(ids)


def memory(_: str) -> Callable[[], float]:
    """Answers with the bytes per second at which all threads together read memory, at best."""
    numbers = torch.ones(READ_BYTES // 4)

    def fastest() -> float:
        taken = []
        for _ in range(5):
            start = time.perf_counter()
            numbers.sum()
            taken.append(time.perf_counter() - start)
        return READ_BYTES / min(taken)

    return fastest


def products(_: str) -> Callable[[], float]:
    """Answers with the products per second of a layer that many rows pass, at best.

    In bfloat16 where the processor has units for it, else in float32; by PyTorch.
    """
    dtype = torch.bfloat16 if has_bf16(torch.device("cpu")) else torch.float32
    x, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(4096, 1024, dtype=dtype)

    def most() -> float:
        taken = []
        for _ in range(9):
            start = time.perf_counter()
            F.linear(x, weight)
            taken.append(time.perf_counter() - start)
        return len(x) * weight.numel() / min(taken)

    return most


def ours(config: MPTConfig, bits: Bits) -> Callable[..., float | dict]:
    """mptbook; without a question, what it is."""
    start = time.perf_counter()
    model = random_model(config, bits)
    made = time.perf_counter() - start
    peak = process_bytes("VmHWM")

    def seconds(*question: int) -> float | dict:
        if not question:
            return {"weight_bytes": weight_bytes(model), "seconds": made, "peak_bytes": peak}
        n_sequences, prompt_tokens, new_tokens = question
        requests = [
            Request(prompt, new_tokens)
            for prompt in some_prompts(config.vocab_size, n_sequences, prompt_tokens)
        ]
        slots = Slots(model, n_sequences, prompt_tokens + new_tokens)
        start = time.perf_counter()
        engine = Engine(slots, AnyIds(config.vocab_size), chunk_tokens=CHUNK)
        for request in requests:
            engine.submit(request)
        while engine.step():
            pass
        return time.perf_counter() - start

    return seconds


def transformers_mpt(config: MPTConfig, dtype: str) -> Seconds:
    """transformers' own MPT, with its cache."""
    model = _native(config).to(getattr(torch, dtype)).eval()

    def seconds(n_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        ids = torch.tensor(some_prompts(config.vocab_size, n_sequences, prompt_tokens))
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    return seconds


def ctranslate2_mpt(config: MPTConfig, weights: str) -> Seconds:
    """CTranslate2, converted from transformers' model."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter, transformers
    from tokenizers import Tokenizer, models

    # Its converter knows the name of the released code only.
    transformers._MODEL_LOADERS["MptConfig"] = transformers._MODEL_LOADERS["MPTConfig"]
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder, "source"), Path(folder, "converted")
        _native(config).save_pretrained(source)
        words = {f"t{i}": i for i in range(config.vocab_size)}
        Tokenizer(models.WordLevel(words, "t0")).save(str(source / "tokenizer.json"))
        about = '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0", '
        about += '"bos_token": "t0", "eos_token": "t0"}'
        (source / "tokenizer_config.json").write_text(about)
        TransformersConverter(str(source)).convert(str(converted), quantization=weights)
        threads = torch.get_num_threads()
        generator = ctranslate2.Generator(str(converted), intra_threads=threads, inter_threads=1)

    def seconds(n_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        prompts = some_prompts(config.vocab_size, n_sequences, prompt_tokens)
        prompts = [[f"t{token}" for token in prompt] for prompt in prompts]
        start = time.perf_counter()
        generator.generate_batch(
            prompts,
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            end_token=[],
        )
        return time.perf_counter() - start

    return seconds


def llama_cpp_mpt(config: MPTConfig, weights: str) -> Seconds:
    """llama.cpp, by the server within its Python package and without HTTP.

    Args:
        weights: f32, bf16, q8_0 or q4_0.
    """
    import xllamacpp

    from mptbook.export import gguf

    settings, threads = xllamacpp.CommonParams(), torch.get_num_threads()
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.n_parallel = SLOTS
    settings.n_ctx = SLOTS * config.max_seq_len
    settings.verbosity = -1
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder, "source"), Path(folder, "converted")
        tokenizer = train_bpe(["a vocabulary, which nothing here reads"] * 2, 290)
        write_random(config, tokenizer, source)
        converted.mkdir()
        gguf.write(source, converted, weights)
        settings.model.path = str(converted / f"model-{weights}.gguf")
        server = xllamacpp.Server(settings)  # which keeps the file open

    def seconds(n_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        def write(prompt: Sequence[int]) -> int:
            how = {"n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
            how |= {"cache_prompt": False}
            answer = server.handle_completions({"prompt": [*prompt]} | how)
            return answer["usage"]["completion_tokens"]

        prompts = some_prompts(config.vocab_size, n_sequences, prompt_tokens)
        with ThreadPoolExecutor(n_sequences) as pool:
            start = time.perf_counter()
            written = [*pool.map(write, prompts)]
            taken = time.perf_counter() - start
        if written != [new_tokens] * n_sequences:
            raise RuntimeError(f"it wrote {written} tokens instead of {new_tokens} each")
        return taken

    return seconds


def some_prompts(vocab_size: int, n_sequences: int, n_tokens: int) -> list[tuple[int, ...]]:
    """The same for every contestant, and no two that begin alike."""
    ids = np.random.default_rng(0).integers(5, vocab_size, (n_sequences, n_tokens))
    return [tuple(row) for row in ids.tolist()]


def _native(config: MPTConfig):
    from transformers import MptConfig, MptForCausalLM, logging

    logging.disable_progress_bar()  # bars take a semaphore, which ending the process would leave
    names = "d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"
    torch.manual_seed(0)
    return MptForCausalLM(MptConfig(**{name: getattr(config, name) for name in names}))
