"""`mptbook bench train`: whole training steps beside transformers', and the machine's own limit.

Each contestant is in a process of its own and takes one step at a time, in rounds that begin
with another one each time. A product of two large matrices takes its turn too: its FLOPs per
second are what the machine can do when nothing else is asked. Memory is Linux's account of a
process.
"""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field, PositiveInt

from mptbook.bench.measure import in_turns, machine, noise, rotated, save
from mptbook.bench.peers import OURS, PEERS
from mptbook.bench.steps import StepBench, contestant, figures, flops_per_token
from mptbook.bench.workers import Worker
from mptbook.data.loader import Rows, batches
from mptbook.data.prepare import Prepare, prepare
from mptbook.tokenizer.bpe import train_bpe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = (OURS, *PEERS)
PRODUCT = "product"
PRODUCT_WIDTH = 2048
PRODUCT_SECONDS = 1.0  # of a turn; the fastest product in it counts
WARM_STEPS = 2  # of each contestant, not timed: memory and kernels are made in them
IMPORTS = ("pass", "import torch", "import mptbook", "from mptbook import MPT, train_steps")


class BenchTrain(StepBench):
    """Training steps beside their peers: `mptbook bench train`."""

    row_tokens: list[PositiveInt] = Field([512, 2048], description="tokens of a row, each timed")
    batch_tokens: PositiveInt = Field(4096, description="tokens of a step; rows are as many as fit")
    repeats: int = Field(7, ge=5, description="rounds; the median is taken")
    figure: Path | None = Field(
        None, description="where to draw them, .svg, .png or .pdf; needs matplotlib"
    )

    def run(self) -> None:
        rows = {row_tokens: self.rows(row_tokens) for row_tokens in self.row_tokens}
        results = {
            "machine": machine(),
            "settings": self.model_dump(mode="json", exclude={"out", "figure"}),
        }
        print(
            f"on {results['machine']['cpu']}, {torch.get_num_threads()} threads, {self.precision}"
        )
        results["shapes"] = [self.time_shape(*shape) for shape in rows.items()]
        results["imports"] = import_seconds(self.repeats)
        print("\nseconds of a fresh process")
        for statement, found in results["imports"].items():
            print(f"  {statement:40} {found['median_seconds']:5.2f}")
        if self.out is not None:
            save(results, self.out)
            print(f"\nwritten to {self.out}")
        if self.figure is not None:
            plot(results["shapes"]).savefig(self.figure)
            print(f"drawn to {self.figure}")

    def rows(self, row_tokens: int) -> int:
        """How many rows make a step.

        Raises:
            ValueError: if no whole number does.
        """
        rows, rest = divmod(self.batch_tokens, row_tokens)
        if rest or not rows:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of the {row_tokens} tokens "
                f"of a row; take a multiple of {math.lcm(*self.row_tokens)}"
            )
        return rows

    def time_shape(self, row_tokens: int, rows: int) -> dict:
        """The figures of all contestants on so many rows of `row_tokens`."""
        steps, rates, waits = self.take_turns(row_tokens, rows)
        shape = {
            "row_tokens": row_tokens,
            "rows": rows,
            "product": {
                "width": PRODUCT_WIDTH,
                "flops_per_second": statistics.median(rates),
                "noise": noise(rates),
                "each": rates,
            },
            "contestants": {
                name: figures(taken, self.batch_tokens) for name, taken in steps.items()
            },
        }
        ours = shape["contestants"][OURS]["median_seconds"]
        for name, found in shape["contestants"].items():
            flops = flops_per_token(name, self.config(row_tokens))
            rate = flops * found["tokens_per_second"]
            found["times_mptbook"] = found["median_seconds"] / ours
            found["flops_per_token"] = flops
            found["flops_per_second"] = rate
            found["share_of_product"] = rate / shape["product"]["flops_per_second"]
        wait = statistics.median(waits)
        shape["wait_for_data"] = {"seconds": waits, "median_seconds": wait, "share": wait / ours}
        show(shape)
        return shape

    def take_turns(self, row_tokens: int, rows: int) -> tuple[dict, list[float], list[float]]:
        """Steps of each contestant, FLOPs per second of the product, seconds of `next(batches)`.

        One of each in every round; the first rounds are left out.
        """
        what = self.config(row_tokens), rows, self.precision
        steps = {name: [] for name in NAMES}
        rates, waits = [], []
        with TemporaryDirectory() as folder, ExitStack() as open_workers:
            stream = prepared_batches(Path(folder), row_tokens, rows)
            workers = {name: Worker(name, contestant, name, *what) for name in NAMES}
            workers[PRODUCT] = Worker(PRODUCT, product, self.precision)
            for worker in workers.values():
                open_workers.enter_context(worker)
            for turn in range(WARM_STEPS + self.repeats):
                for name in rotated(workers, turn):
                    (rates if name == PRODUCT else steps[name]).append(workers[name].ask())
                start = time.perf_counter()
                next(stream)
                waits.append(time.perf_counter() - start)
        kept = slice(WARM_STEPS, None)
        return {name: taken[kept] for name, taken in steps.items()}, rates[kept], waits[kept]


def product(precision: str) -> Callable[[], float]:
    """A function that gives the FLOPs per second of a product of two square matrices.

    The fastest of those that fit in `PRODUCT_SECONDS`.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype)

    def fastest() -> float:
        best, end = float("inf"), time.perf_counter() + PRODUCT_SECONDS
        while (start := time.perf_counter()) < end:
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
        return 2 * PRODUCT_WIDTH**3 / best

    return fastest


def prepared_batches(folder: Path, row_tokens: int, rows: int) -> Iterator:
    """Batches out of a folder that `prepare` made of half a million made-up words."""
    rng = np.random.default_rng(0)
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), (5000, 7))
    words = ["".join(word[: 2 + i % 6]) for i, word in enumerate(letters)]
    text, source = " ".join(rng.choice(words, 500_000)), folder / "words.txt"
    source.write_text(text)
    tokenizer = folder / "tokenizer.json"
    train_bpe([text], vocab_size=1024).save(tokenizer)
    settings = Prepare(
        out=folder / "rows",
        tokenizer=str(tokenizer),
        row_tokens=row_tokens,
        source={"words": str(source)},
    )
    prepare(settings)
    return batches(Rows(settings.out), rows, seed=0)


def import_seconds(repeats: int) -> dict[str, dict]:
    """Seconds of a Python process that runs one of `IMPORTS` and ends, for each."""

    def run(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True)

    seconds = in_turns({one: lambda s=one: run(s) for one in IMPORTS}, repeats)
    return {
        one: {"seconds": each, "median_seconds": statistics.median(each), "noise": noise(each)}
        for one, each in seconds.items()
    }


def plot(shapes: list[dict]) -> "Figure":
    """Milliseconds of a step of each contestant, with the quartiles of their repetitions.

    A mark says how long its products would take at the speed of the large product.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.4 + 1.5 * len(shapes)), layout="constrained")
    for shape, axes in zip(shapes, figure.subplots(len(shapes), squeeze=False)[:, 0], strict=True):
        peak = shape["product"]["flops_per_second"]
        for place, found in enumerate(shape["contestants"].values()):
            ms, spread = found["median_seconds"] * 1e3, found["noise"] * found["median_seconds"]
            colour = "C0" if place == 0 else "0.6"
            axes.barh(place, ms, xerr=spread * 1e3, color=colour, ecolor="C3")
            least = ms * found["flops_per_second"] / peak
            axes.plot([least, least], [place - 0.4, place + 0.4], color="k", lw=2)
        axes.set_yticks(range(len(shape["contestants"])), shape["contestants"])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{shape['rows']} rows of {shape['row_tokens']:,} tokens", fontsize="medium")
    axes.set_xlabel("ms a step; black: its products at the speed of one large product")
    return figure


def show(shape: dict) -> None:
    """Print the figures of one shape as a table."""
    peak = shape["product"]
    print(f"\n{shape['rows']} rows of {shape['row_tokens']:,} tokens a step")
    print(
        f"  product of {peak['width']:,} x {peak['width']:,}: "
        f"{peak['flops_per_second'] / 1e9:,.0f} GFLOP/s, noise {peak['noise']:.1%}"
    )
    print(
        f"  {'':22} {'ms':>7} {'noise':>6} {'tokens/s':>9} {'x mptbook':>9} {'GFLOP/s':>8} "
        f"{'of product':>10} {'bytes/token':>11}"
    )
    for name, found in shape["contestants"].items():
        print(
            f"  {name:22} {found['median_seconds'] * 1e3:7,.0f} {found['noise']:6.1%} "
            f"{found['tokens_per_second']:9,.0f} {found['times_mptbook']:9.2f} "
            f"{found['flops_per_second'] / 1e9:8,.0f} {found['share_of_product']:10.0%} "
            f"{found['bytes_per_token']:11,.0f}"
        )
    wait = shape["wait_for_data"]
    print(
        f"  mptbook waits {wait['median_seconds'] * 1e3:.2f} ms a step for its data, "
        f"{wait['share']:.2%} of it"
    )
