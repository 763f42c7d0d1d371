"""`mptbook bench storywriter`: what long rows give a model that has learned on short ones.

StoryWriter's recipe in small: mpt-tiny learns on rows of 512 tokens, then goes on with rows of
8,192, `configs/tiny-storywriter.toml`. All models then read books that none was trained on: loss
by position, retrieval, and what each writes after a whole novel. The long rows are learned twice:
with slopes whose flattest head loses a nat over them, and with StoryWriter's own, flatter ones.

Texts of a few megabytes teach a small model nothing that lies thousands of tokens back. So a
fifth of what it reads in short rows are echoes: lines out of the other texts, most of which come
again.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import Field, PositiveInt

from mptbook.bench.measure import Bench, peak_memory
from mptbook.data.corpora import default_domains, load_domain
from mptbook.data.prepare import DEFAULT, Prepare, prepare
from mptbook.data.shards import read_table
from mptbook.directory import load_model
from mptbook.eval.longcontext import TASKS, examine
from mptbook.infer.generate import generate
from mptbook.model.config import MPTConfig
from mptbook.model.mpt import MPT
from mptbook.settings import CONFIGS
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.log import read_log
from mptbook.train.loop import train_steps
from mptbook.train.optimizer import make_optimizer
from mptbook.train.pretrain import Pretrain, pretrain

SHORT = "short rows"
FLATTER = "long rows, bias_max 16"
LONG = {"long rows, bias_max 13": 13, FLATTER: 16}
BOOKS = ("Wells, H. G. - The Island of Doctor Moreau", "Huxley, Aldous - Crome Yellow")
ROW_TOKENS = 512  # of the short rows
ENDING = "\n\nEPILOGUE\n\n"
ECHOES = "echoes"
LINE = 20, 300  # characters, fewest and most
AGAIN = 0.6  # of the lines were there before


def echoes(
    texts: Sequence[str], n_documents: int, n_characters: int, seed: int = 0
) -> Iterator[str]:
    """Documents of lines out of `texts`, most of which stood in the document before.

    How many lines back is spread evenly over the orders of magnitude, from one to all.

    Args:
        n_characters: of a document, at least.
    """
    chance = random.Random(seed)
    sizes = [len(text) for text in texts]
    for _ in range(n_documents):
        lines: list[str] = []
        length = 0
        while length < n_characters:
            if lines and chance.random() < AGAIN:
                line = lines[-min(len(lines), int((len(lines) + 1) ** chance.random()))]
            else:
                (text,) = chance.choices(texts, sizes)
                size = int(LINE[0] * (LINE[1] / LINE[0]) ** chance.random())
                start = chance.randrange(max(1, len(text) - size))
                line = " ".join(text[start : start + size].split())
            lines.append(line)
            length += len(line) + 1
        yield "\n".join(lines) + "\n"


class BenchStoryWriter(Bench):
    """Train on short rows, then on long ones, and read books: `mptbook bench storywriter`."""

    tokenizer: str = Field(description="a tokenizer.json of mpt-tiny's 8,192 ids")
    home: Path = Field(description="folder for the rows and all runs; an interrupted one goes on")
    positions: list[PositiveInt] = Field(
        [64, 256, 512, 1024, 2048, 4096, 8192, 10_650],
        description="tokens read before, for the loss; the last is beyond the long rows",
    )
    tokens: list[PositiveInt] = Field(
        [512, 2048, 8192], description="lengths of context for the questions"
    )
    spans: PositiveInt = Field(32, description="parts of each book to find the loss of")
    questions: PositiveInt = Field(40, description="at each length and place")
    new_tokens: PositiveInt = Field(120, description="of an ending")
    step_tokens: list[PositiveInt] = Field(
        [512, 2048, 8192, 32_768], description="rows to find the memory of a training step for"
    )

    def compare(self) -> dict:
        """The figures, as JSON has them."""
        rows = self.home / "rows"
        domains = [*default_domains(), ECHOES]
        self._prepare(rows, domains)
        keep_freed_memory()
        recipes = self._recipes(rows, domains)
        found = {name: _trained(settings) for name, settings in recipes.items()}
        for name, settings in recipes.items():
            print(f"\n{name}: {settings.out}")
            model, tokenizer = load_model(settings.out), Tokenizer.load(settings.out / "model")
            for number, (title, book) in enumerate(held_out_books(rows).items()):
                print(title)
                tasks = TASKS if number == 0 else ("book",)  # the other is not about a book
                tasks = () if name == FLATTER else tasks  # of that one, the loss is asked for
                found[name]["books"][title] = self._read(model, tokenizer, book, tasks)
        settings = self.model_dump(
            mode="json", include={"positions", "tokens", "spans", "questions"}
        )
        memory = {T: peak_memory(one_step, T) for T in self.step_tokens}
        for T, size in memory.items():
            print(f"a training step of a row of {T:6,} tokens adds {size / 1e6:,.0f} MB")
        return {"settings": settings, "models": found, "memory": memory}

    def _recipes(self, rows: Path, domains: Sequence[str]) -> dict[str, Pretrain]:
        how = {"data": rows, "resume": True}
        out, every = self.home / "short", dict.fromkeys(domains, 1)
        short = Pretrain.from_toml(CONFIGS / "tiny.toml", out=out, mixture=every, **how)
        recipes = {SHORT: short}
        for name, most in LONG.items():
            recipe = Pretrain.from_toml(
                CONFIGS / "tiny-storywriter.toml",
                out=self.home / f"long-{most}",
                weights=str(self.home / "short"),
                **how,
            )
            recipe.shape = recipe.shape | {"alibi_bias_max": most}
            recipes[name] = recipe
        return recipes

    def _prepare(self, rows: Path, domains: Sequence[str]) -> None:
        """Rows of the default texts but `BOOKS`, and of echoes out of them."""
        file = self.home / f"{ECHOES}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            texts = []
            for name in domains[:-1]:
                dataset = load_domain(name, "train")
                named = zip(dataset["name"], dataset["text"], strict=True)
                texts += [text for title, text in named if title not in BOOKS]
            lines = [json.dumps({"text": text}) for text in echoes(texts, 300, 40_000)]
            file.write_text("\n".join(lines))
        source = dict.fromkeys(domains, DEFAULT) | {ECHOES: str(file)}
        prepare(
            Prepare(
                out=rows,
                tokenizer=self.tokenizer,
                row_tokens=ROW_TOKENS,
                source=source,
                hold_out=[*BOOKS, f"{ECHOES}.jsonl:0"],
            )
        )

    def _read(self, model: MPT, tokenizer: Tokenizer, book: str, tasks: Sequence[str]) -> dict:
        how = {"spans": self.spans, "questions": self.questions, "tasks": tasks}
        figures = examine(
            model, tokenizer, book, positions=self.positions, tokens=self.tokens, **how
        )
        prompt = book + ENDING
        (ending,) = generate(
            model, tokenizer, prompt, max_new_tokens=self.new_tokens, temperature=0.8, top_p=0.95
        )
        n_tokens = len(tokenizer.encode(prompt))
        print(f"{n_tokens:,} tokens read, and an ending:{ENDING}{ending}\n")
        return figures | {"tokens": n_tokens, "ending": ending}


def _trained(settings: Pretrain) -> dict:
    """Train, unless that is done, and what the run was."""
    if not (settings.out / "model").exists():
        pretrain(settings)
    steps = read_log(settings.out, "step")
    model = load_model(settings.out)
    return {
        "row_tokens": model.config.max_seq_len,
        "alibi_bias_max": model.config.attn_config.alibi_bias_max,
        "tokens": settings.steps * settings.batch_tokens,
        "seconds": steps[-1]["seconds"],
        "seed": settings.seed,
        "books": {},
    }


def one_step(row_tokens: int) -> None:
    """Take a training step of `configs/tiny-storywriter.toml` on one row of so many tokens."""
    settings = Pretrain.from_toml(CONFIGS / "tiny-storywriter.toml", data=Path(), out=Path())
    model = MPT(MPTConfig.named(settings.model).replace(max_seq_len=row_tokens, **settings.shape))
    model.recompute = settings.recompute
    ids = torch.randint(model.config.vocab_size, (1, row_tokens))
    optimizer = make_optimizer(model, settings.optim)
    for _ in train_steps(model, iter([(ids, ids)]), optimizer, lambda _: 1e-4, steps=1):
        pass


def held_out_books(rows: Path) -> dict[str, str]:
    """`BOOKS`, whole, by name."""
    table = read_table(rows / "heldout" / "novels.arrow")
    texts = dict(zip(table["name"], table["text"], strict=True))
    return {name: texts[name] for name in BOOKS}
