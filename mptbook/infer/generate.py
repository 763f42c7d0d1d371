"""Continue texts with a model, one token at a time.

Dimensions in this file
    B   prompts
    T   tokens of the longest prompt
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic_settings import CliPositionalArg
from torch import Tensor

from mptbook.directory import find_directory, load_model
from mptbook.infer.cache import KVCache
from mptbook.infer.sampling import check_sampling, sample
from mptbook.model.mpt import MPT
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer


def generate(
    model: MPT,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    Prompts of unequal length are read together; what comes out for one does not depend on
    the others, but for rounding. A continuation ends before an end-of-text token.

    Args:
        prompts: one or many; an empty one asks for a new document.
        max_new_tokens: tokens at most.
        temperature, top_k, top_p: see `mptbook.infer.sampling.sample`.
        seed: the same seed gives the same text.

    Raises:
        ValueError: if a sampling value is out of its range, or a model with learned positions
            runs out of them.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [tokenizer.encode(prompt) or [tokenizer.end_of_text] for prompt in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for tokens in next_tokens(model, ids, max_new_tokens, len(tokenizer), seed, **sampling):
        for row, token in enumerate(tokens.tolist()):
            ended[row] = ended[row] or token == tokenizer.end_of_text
            if not ended[row]:
                out[row].append(token)
        if all(ended):
            break
    return [tokenizer.decode(tokens) for tokens in out]


def stream(
    model: MPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """As `generate` for one prompt, but the text comes in pieces, as soon as it is certain.

    A token may end within a character; such a piece waits for the rest of it.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    out: list[int] = []
    shown = ""
    for tokens in next_tokens(model, [ids], max_new_tokens, len(tokenizer), seed, **sampling):
        token = int(tokens[0])
        if token == tokenizer.end_of_text:
            break
        out.append(token)
        text = tokenizer.decode(out)
        if not text.endswith("�") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(out)[len(shown) :]
    if rest:
        yield rest


@torch.no_grad()
def next_tokens(
    model: MPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    n_ids: int,
    seed: int,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Iterator[Tensor]:
    """(B,) int64 tokens, again and again; each is read before the next is chosen.

    Args:
        prompts: ids of each prompt, at least one each.
        n_ids: ids of the tokenizer; a padded vocabulary has more, which are never chosen.
    """
    check_sampling(temperature, top_k, top_p)
    model.eval()
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    ids, documents = left_pad(prompts)
    ids = ids.to(device)
    documents = None if documents is None else documents.to(device)
    cache = KVCache(model.config.n_layers, room=ids.shape[1] + max_new_tokens)
    for _ in range(max_new_tokens):
        hidden = model.hidden(ids, documents, cache)
        logits = model.logits(hidden[:, -1:])[:, 0, :n_ids]
        tokens = sample(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        yield tokens
        ids = tokens[:, None]
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:]], dim=1)


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Prompts as one block that ends with the last token of each.

    Returns:
        (B, T) int64 ids, and (B, T) document ids that keep the padding (document 0) from the
        prompt (document 1), or None where all prompts are equally long.
    """
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    documents = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        documents[row, longest - len(prompt) :] = 1
    return ids, None if documents.all() else documents


class Generate(RunSettings):
    """Continue a prompt, printing as it goes: `mptbook generate DIR --prompt "..."`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    prompt: str = Field("", description="text to continue; empty for a new document")
    max_new_tokens: PositiveInt = Field(128, description="tokens at most")
    temperature: NonNegativeFloat = Field(0.8, description="0 takes the most likely token")
    top_k: PositiveInt | None = Field(None, description="choose among the k most likely")
    top_p: float | None = Field(0.95, description="choose among the likeliest that reach p")
    seed: int = Field(0, description="the same seed gives the same text")

    def run(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        model = load_model(self.model)
        tokenizer = Tokenizer.load(find_directory(self.model))
        sampling = self.model_dump(exclude={"model", "prompt"})
        sys.stdout.write(self.prompt)
        for piece in stream(model, tokenizer, self.prompt, **sampling):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
