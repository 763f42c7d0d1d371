"""`mptbook bench preference`: what learning from preferences changes, for several betas.

All runs begin as the same small chat model and learn from the default preference set. Two of them
are what one might do instead: raise the likelihood of chosen answers only, and take pairs of any
length. Afterwards each is asked about every topic, and held-out pairs are compared. It takes some
25 minutes of one core.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from mptbook.bench.measure import Bench
from mptbook.data.conversations import Mistakes
from mptbook.data.preferences import default_pairs, longer_chosen, rated_conversations
from mptbook.directory import find_directory, load_model, save_model
from mptbook.finetune.dpo import EncodedPair, answer_log_probs, encode_pairs, pair_log_probs
from mptbook.finetune.preference import Liking, Preference, prefer
from mptbook.infer.generate import complete
from mptbook.infer.request import Request
from mptbook.model.mpt import MPT
from mptbook.tokenizer.chat import ChatTemplate, encode_prompt, stop_ids
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.recipe import trained

BETAS = (0.02, 0.1, 0.5)
USUAL = 0.1  # beta of the runs in which something else differs
SAMPLES = 4  # answers to each topic
MOST_TOKENS = 96  # of an answer
PAIR_TOKENS = 160  # of a prompt with an answer; a sixth of the pairs is longer
CHOSEN_ONLY, ANY_LENGTH = "chosen only", "any length"


@dataclass(frozen=True)
class Asked:
    """What all models are measured with.

    Attributes:
        prompts: each topic, `SAMPLES` times, as ids.
        heldout: pairs that no model learned from.
        reference: the model that all began as, and (B, 2) what it gives the held-out pairs.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    prompts: list[list[int]]
    heldout: list[EncodedPair]
    reference: MPT
    before: Tensor


def likelihood_steps(
    model: MPT,
    examples: Sequence[tuple[list[int], list[int]]],
    *,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """Raise the likelihood of answers after their prompts, in place.

    AdamW as `mptbook prefer` has it: its rate rises over a tenth of the steps and falls to 0.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    warmup = max(1, round(0.1 * steps))
    order = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / (steps - warmup))
        chosen = torch.randint(len(examples), (batch,), generator=order).tolist()
        prompts, answers = zip(*(examples[n] for n in chosen), strict=True)
        tokens = sum(map(len, answers))
        (-answer_log_probs(model, prompts, answers).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def written(model: MPT, asked: Asked, seed: int = 0) -> list[list[int]]:
    """The ids that a model writes after each prompt at temperature 1, its end included."""
    ends = frozenset(stop_ids(asked.template, asked.tokenizer))
    stop = (asked.template.stop,) if asked.template.stop else ()
    requests = [
        Request(tuple(prompt), MOST_TOKENS, 1.0, seed=seed + row, stop=stop, stop_ids=ends)
        for row, prompt in enumerate(asked.prompts)
    ]
    return [list(one.ids) for one in complete(model, asked.tokenizer, requests)]


def measure(model: MPT, asked: Asked) -> dict:
    """How a model compares held-out pairs, what it writes, and how far it went.

    Returns:
        The figures of `Liking`; ``heldout_loss``, nats for each token of held-out answers, chosen
        or not; ``tokens`` of what it writes, (mean, standard error), and the parts of it that
        ended, and that have a ! or a ?; ``kl``, nats from the reference for each answer, (mean,
        standard error).
    """
    after = pair_log_probs(model, asked.heldout)
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in asked.heldout)
    rows = written(model, asked)
    texts = [asked.tokenizer.decode(row) for row in rows]
    return vars(Liking.of(after, asked.before)) | {
        "heldout_loss": -float(after.sum()) / tokens,
        "tokens": mean_and_error([float(len(row)) for row in rows]),
        "ended": sum(len(row) < MOST_TOKENS for row in rows) / len(rows),
        "exclaims": sum("!" in text for text in texts) / len(texts),
        "asks": sum("?" in text for text in texts) / len(texts),
        "kl": mean_and_error(gained(model, asked, rows)),
    }


@torch.no_grad()
def gained(model: MPT, asked: Asked, rows: list[list[int]]) -> list[float]:
    """By how many nats a model finds each of its answers likelier than the reference does.

    The mean over answers drawn from the model estimates its KL divergence from the reference.
    """
    found: list[float] = []
    for n in range(0, len(rows), 16):
        block = asked.prompts[n : n + 16], rows[n : n + 16]
        found += (
            answer_log_probs(model, *block) - answer_log_probs(asked.reference, *block)
        ).tolist()
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    all_of_them = torch.tensor(values)
    return float(all_of_them.mean()), float(all_of_them.std()) / math.sqrt(len(values))


def start_from(base: str, out: Path, *, steps: int, batch: int, lr: float) -> None:
    """A chat model of a base model, written to `out`: it learns the answers of all training
    pairs, liked or not."""
    folder = find_directory(base)
    model, tokenizer = load_model(folder, torch.float32), Tokenizer.load(folder)
    template = ChatTemplate.load("chatml")
    pairs = encoded("train", template, tokenizer, matched=False)
    examples = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    likelihood_steps(model, examples, lr=lr, steps=steps, batch=batch, seed=0)
    save_model(model, out, tokenizer, template=template)


def encoded(
    split: str, template: ChatTemplate, tokenizer: Tokenizer, *, matched: bool
) -> list[EncodedPair]:
    """The default pairs of at most `PAIR_TOKENS`."""
    pairs = default_pairs(split, matched=matched)
    return encode_pairs(template, tokenizer, pairs, PAIR_TOKENS, Mistakes())[0]


def ask(model: MPT, tokenizer: Tokenizer, template: ChatTemplate) -> Asked:
    """What runs that begin as this model are measured with."""
    topics = sorted({one.topic for one in rated_conversations()})
    prompts = [
        encode_prompt(template, tokenizer, [{"role": "user", "content": topic}]) for topic in topics
    ]
    heldout = encoded("heldout", template, tokenizer, matched=True)
    before = pair_log_probs(model, heldout)
    return Asked(tokenizer, template, prompts * SAMPLES, heldout, model, before)


def about_pairs() -> dict:
    """How many pairs there are, and how often the longer answer is the chosen one."""
    found = {}
    for split in ("train", "heldout"):
        for matched in (True, False):
            pairs = default_pairs(split, matched=matched)
            name = f"{split}, {'matched' if matched else ANY_LENGTH}"
            found[name] = {"pairs": len(pairs), "longer_chosen": longer_chosen(pairs)}
    return found


def compare(
    start: Path, *, steps: int = 96, seeds: int = 2, lr: float = 1e-4, batch_pairs: int = 8
) -> dict:
    """Learn from preferences by each beta, and in the two other ways.

    Args:
        start: a model directory with a chat template.
        steps: of each training.
        seeds: trainings of each; a seed sets the order of the pairs.

    Returns:
        What `book/_data/preference.json` holds: settings, ``start`` as `measure` has it, and
        ``runs``, each with its way, beta, seed and the same figures.
    """
    model, tokenizer = load_model(start, torch.float32), Tokenizer.load(start)
    asked = ask(model, tokenizer, ChatTemplate.load(start))
    how = {"steps": steps, "lr": lr, "batch_pairs": batch_pairs}
    found = {"settings": how | {"seeds": seeds, "topics": len(asked.prompts) // SAMPLES}}
    found |= {"pairs": about_pairs(), "start": measure(model, asked), "runs": []}
    ways = [*(("preferences", beta) for beta in BETAS), (ANY_LENGTH, USUAL), (CHOSEN_ONLY, None)]
    for seed in range(seeds):
        for way, beta in ways:
            learned = _learn(way, beta, seed, start, asked, how)
            figures = measure(learned, asked)
            found["runs"].append({"way": way, "beta": beta, "seed": seed} | figures)
            print(
                f"{way:12} beta {beta or '-':<5} seed {seed}  {figures['accuracy']:.1%} of pairs, "
                f"KL {figures['kl'][0]:.1f} nats, {figures['tokens'][0]:.0f} tokens",
                flush=True,
            )
    return found


def _learn(way: str, beta: float | None, seed: int, start: Path, asked: Asked, how: dict) -> MPT:
    if way == CHOSEN_ONLY:
        model = load_model(start, torch.float32)
        pairs = encoded("train", asked.template, asked.tokenizer, matched=True)
        examples = [(pair.prompt, pair.chosen) for pair in pairs]
        sizes = {"lr": how["lr"], "steps": how["steps"], "batch": how["batch_pairs"]}
        likelihood_steps(model, examples, **sizes, seed=seed)
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        how = how | {"beta": beta, "seed": seed, "matched": way != ANY_LENGTH}
        how |= {"heldout": 0, "max_tokens": PAIR_TOKENS}  # measured here, for all ways alike
        prefer(Preference(model=str(start), out=out, **how), quiet=True)
        return load_model(out, torch.float32)


class BenchPreference(Bench):
    """What learning from preferences changes: `mptbook bench preference`."""

    model: str = Field(
        "", description="a chat model to begin as (default: mpt-tiny, which first learns to chat)"
    )
    start_steps: PositiveInt = Field(60, description="steps in which it learns to chat")
    start_lr: PositiveFloat = Field(1e-3, description="peak learning rate of these")
    steps: PositiveInt = Field(96, description="steps of each training")
    seeds: PositiveInt = Field(2, description="trainings in each way")
    lr: PositiveFloat = Field(1e-4, description="peak learning rate of each training")
    batch_pairs: PositiveInt = Field(8, description="pairs per step")

    def compare(self) -> dict:
        keep_freed_memory()
        begin = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            start = Path(folder) / "start"
            if self.model:
                start = find_directory(self.model)
            else:
                base = str(trained("tiny"))
                start_from(base, start, steps=self.start_steps, batch=16, lr=self.start_lr)
            how = {"steps": self.steps, "seeds": self.seeds, "lr": self.lr}
            found = compare(start, **how, batch_pairs=self.batch_pairs)
        chat = {"model": self.model or "tiny", "start_steps": self.start_steps}
        found["settings"] |= {} if self.model else chat | {"start_lr": self.start_lr}
        return found | {"cpu_seconds": time.process_time() - begin}
