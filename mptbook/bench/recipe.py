"""`mptbook bench recipe`: what each departure of mpt-tiny's recipe from the plain one is worth.

Each training leaves one of them out; the last two leave out all of them.
"""

from pathlib import Path

import torch

from mptbook.bench.training import TrainingBench, tiny_config, tiny_run, train
from mptbook.data.loader import Rows
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.model.mpt import MPT
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.heldout import front, load_heldout
from mptbook.train.pretrain import Pretrain

RECIPE = "the recipe"
ALIKE = {"embedding_lr": 1.0, "vector_lr": 1.0}
# What differs from the recipe: fields of `Optim`, and whether the shape is left as it is named.
VARIANTS: dict[str, tuple[dict, bool]] = {
    RECIPE: ({}, False),
    "norms at the rate of matrices": ({"vector_lr": 1.0}, False),
    "embeddings at the rate of matrices": ({"embedding_lr": 1.0}, False),
    "residual outputs divided as in MPT": ({}, True),
    "none of the three": (ALIKE, True),
    "none of the three, lr 6e-4": (ALIKE | {"lr": 6e-4}, True),
}
HELDOUT_CHARACTERS = 65_536  # of each domain


def variant(name: str) -> Pretrain:
    """The settings of `configs/tiny.toml` with one of `VARIANTS` changed."""
    optim, plain_shape = VARIANTS[name]
    recipe = tiny_run()
    recipe.optim = recipe.optim.model_copy(update=optim)
    if plain_shape:
        recipe.shape = {}
    return recipe


def compare(data: str | Path, *, steps: int = 600, seeds: int = 2) -> dict:
    """Train mpt-tiny by each of `VARIANTS`, on the same batches.

    Args:
        data: a folder that `mptbook prepare` wrote.
        steps: of each training.
        seeds: trainings of each; a seed sets the weights and the order of the rows.

    Returns:
        Settings, and ``bits_per_byte``: for each variant that of the front of all held-out
        texts after the last step, one for each seed.
    """
    keep_freed_memory()
    rows, tokenizer = Rows(data), Tokenizer.load(data)
    texts = front(load_heldout(Path(data)), HELDOUT_CHARACTERS)
    found: dict[str, list[float]] = {}
    for name in VARIANTS:
        recipe = variant(name)
        config = tiny_config(rows, recipe)
        found[name] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = MPT(config)
            train(model, rows, recipe.optim, steps=steps, seed=seed)
            parts = [perplexity(model, tokenizer, part) for part in texts.values()]
            found[name].append(sum(parts, start=Prediction(0.0, 0, 0)).bits_per_byte)
        print(f"{name:36}", *(f"{bits:.4f}" for bits in found[name]), flush=True)
    return {
        "steps": steps,
        "seeds": seeds,
        "row_tokens": rows.row_tokens,
        "heldout_characters": HELDOUT_CHARACTERS,
        "bits_per_byte": found,
    }


class BenchRecipe(TrainingBench):
    """Train mpt-tiny without parts of its recipe: `mptbook bench recipe`."""

    def compare(self) -> dict:
        return compare(self.data, steps=self.steps, seeds=self.seeds)
