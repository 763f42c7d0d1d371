"""`mptbook bench serve`: requests one after another, and as many at the same time.

The server is `mptbook serve` in a process of its own, with random weights on disk; this process
is its only client, by plain HTTP, and says how much of a core it takes for that. A round asks in
three ways, with prompts that no one has read before: one by one; all at once; and one by one
while all other slots are being written, which is how a newcomer finds a busy server.

Between two rounds, how fast memory is read and products of many rows are computed. From that
follows what a server of 16 bits could gain at most by answering all at once.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from mptbook.bench.clients import ask, new_prompts, serving, write_random, written
from mptbook.bench.measure import Bench, noise, rotated
from mptbook.bench.workers import Worker
from mptbook.bench.writers import memory, products
from mptbook.infer.quantize import Bits
from mptbook.model.config import MPTConfig
from mptbook.plan.costs import parameters
from mptbook.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOM = 16  # times the tokens of an answer, for those that are written while others come


class BenchServe(Bench):
    """Ask a server one by one and all at once: `mptbook bench serve`."""

    model: str = Field("mpt-125m", description="a named size")
    tokenizer: str = Field("gpt-neox", description="gpt-neox, or a tokenizer.json")
    bits: list[Bits] = Field([16, 8, 4], description="of a weight; a server for each")
    requests: int = Field(8, ge=2, description="one by one, then at once")
    prompt_tokens: list[PositiveInt] = Field([32, 256], description="of each; one after another")
    new_tokens: int = Field(32, ge=2, description="written to each")
    slots: PositiveInt = Field(8, description="of the server")
    chunk_tokens: PositiveInt = Field(256, description="of prompts, read between two steps")
    repeats: PositiveInt = Field(5, description="rounds; medians are shown")
    figure: Path | None = Field(None, description="where to draw the figures")

    def compare(self) -> dict:
        """The figures, as JSON has them."""
        if self.slots < self.requests:
            raise ValueError(
                f"{self.requests} requests at once, but {self.slots} slots; give one to each"
            )
        tokenizer = Tokenizer.load(self.tokenizer)
        config = MPTConfig.named(self.model)
        rounds = {bits: {n: [] for n in self.prompt_tokens} for bits in self.bits}
        machine: dict[str, list[float]] = {"bytes_per_second": [], "products_per_second": []}
        with TemporaryDirectory() as scratch, ExitStack() as stack:
            folder = Path(scratch, "random")
            write_random(config, tokenizer, folder)
            ports = {bits: stack.enter_context(self._serving(folder, bits)) for bits in self.bits}
            makers = zip(machine, (memory, products), strict=True)
            speeds = {name: stack.enter_context(Worker(name, make, "")) for name, make in makers}
            new_prompt = new_prompts(len(tokenizer))
            for turn in range(1 + self.repeats):  # the first warms up
                for bits in rotated(self.bits, turn):
                    for n in self.prompt_tokens:
                        some = [new_prompt(n) for _ in range(4 * self.requests)]
                        found = self._round(ports[bits], some)
                        if turn:
                            rounds[bits][n].append(found)
                for name, speed in speeds.items():
                    machine[name].append(speed.ask())
                print(f"round {turn} of {self.repeats}", file=sys.stderr)
        found = {
            f"{bits} bits": {str(n): summary(each) for n, each in by_prompt.items()}
            for bits, by_prompt in rounds.items()
        }
        of_machine = {name: statistics.median(each) for name, each in machine.items()}
        for n, each in found.get("16 bits", {}).items():
            each["most_ratio"] = most_ratio(
                config, self.requests, int(n), self.new_tokens, **of_machine
            )
        show(found)
        print(
            "memory at {:.0f} GB/s, {:.0f} G products/s".format(
                *(each / 1e9 for each in of_machine.values())
            )
        )
        if self.figure is not None:
            plot(found).savefig(self.figure)
        return {
            "settings": self.model_dump(mode="json", exclude={"out", "figure"}),
            **of_machine,
            "servers": found,
        }

    def _serving(self, folder: Path, bits: int) -> AbstractContextManager[int]:
        tokens = max(self.prompt_tokens) + ROOM * self.new_tokens
        how = {"bits": bits, "slots": self.slots, "chunk-tokens": self.chunk_tokens}
        return serving(folder, **how, tokens=tokens)

    def _round(self, port: int, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
        """Seconds, tokens a second and the client's share of a core, of one round."""
        first, second, third, fourth = (prompts[n::4] for n in range(4))
        start, busy = time.perf_counter(), time.process_time()
        alone = [ask(port, prompt, self.new_tokens) for prompt in first]
        with ThreadPoolExecutor(self.requests) as pool:
            at_once = [*pool.map(lambda prompt: ask(port, prompt, self.new_tokens), second)]
        with written(port, third[1:], (ROOM - 1) * self.new_tokens):
            joining = [ask(port, prompt, 2) for prompt in fourth]
        found = {
            "client": (time.process_time() - busy) / (time.perf_counter() - start),
            "joining_first": statistics.median(one.first for one in joining),
            "joining_worst": max(one.first for one in joining),
        }
        for name, answers in (("alone", alone), ("at_once", at_once)):
            seconds = max(one.came[-1] for one in answers) - min(one.sent for one in answers)
            found[f"{name}_speed"] = sum(len(one.came) for one in answers) / seconds
            found[f"{name}_first"] = statistics.median(one.first for one in answers)
            found[f"{name}_worst"] = max(one.first for one in answers)
            found[f"{name}_between"] = statistics.median(one.between for one in answers)
        return found


def most_ratio(
    config: MPTConfig,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    bytes_per_second: float,
    products_per_second: float,
) -> float:
    """How many times the tokens a second of one by one all at once could be at most, in 16 bits.

    A pass takes as long as its weights come out of memory, or as its products are computed,
    whatever is longer; nothing else takes time. A product is a multiplication and an addition.
    """
    parts = parameters(config)
    layers, head = parts["attention"] + parts["mlp"], config.vocab_size * config.d_model

    def seconds(rows: int, texts: int) -> float:
        reading = 2 * (layers + head) / bytes_per_second
        return max(reading, (rows * layers + texts * head) / products_per_second)

    alone, at_once = (
        seconds(n * prompt_tokens, n) + (new_tokens - 1) * seconds(n, n) for n in (1, requests)
    )
    return requests * (alone / at_once)  # no more than so many times, rounded or not


def summary(rounds: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Medians over rounds, each with its noise; ratios are taken within a round."""
    ratios = {
        "speed_ratio": ("at_once_speed", "alone_speed"),
        "first_ratio": ("at_once_first", "alone_first"),
        "worst_ratio": ("at_once_worst", "alone_first"),
        "joining_ratio": ("joining_first", "alone_first"),
        "between_ratio": ("at_once_between", "alone_between"),
    }
    values = {name: [each[name] for each in rounds] for name in rounds[0]}
    for name, (above, below) in ratios.items():
        values[name] = [each[above] / each[below] for each in rounds]
    found = {name: statistics.median(each) for name, each in values.items()}
    return found | {f"{name}_noise": noise(each) for name, each in values.items()}


def show(found: dict) -> None:
    """A table; the second is what many at once are, relative to one."""
    heads = "tokens/s", "noise", "first token", "worst", "joining", "between"
    print(f"\n{'':30}" + "".join(f"{head:>12}" for head in heads))
    for bits, by_prompt in found.items():
        for n, each in by_prompt.items():
            for name, what in (("alone", "one by one"), ("at_once", "at once")):
                first, worst, between = (
                    f"{1e3 * each[f'{name}_{of}']:,.0f} ms" for of in ("first", "worst", "between")
                )
                joining = f"{1e3 * each['joining_first']:,.0f} ms" if name == "at_once" else ""
                cells = first, worst, joining, between
                print(
                    f"{f'{bits}, prompts of {n}, {what}':34}{each[f'{name}_speed']:8,.1f}"
                    f"{each[f'{name}_speed_noise'] or 0:12.1%}"
                    + "".join(f"{cell:>12}" for cell in cells)
                )
            of = "speed", "", "first", "worst", "joining", "between"
            cells = (f"{each[f'{name}_ratio']:.1f} x" if name else "" for name in of)
            print(f"{'':30}" + "".join(f"{cell:>12}" for cell in cells))
            if "most_ratio" in each:
                print(f"{'':30}{each['most_ratio']:10.1f} x if nothing were lost")
    most = max(each["client"] for by_prompt in found.values() for each in by_prompt.values())
    print(f"the client took {most:.0%} of a core at most")


def plot(found: dict) -> "Figure":
    """Tokens a second and seconds to the first token, one by one and at once."""
    from matplotlib.figure import Figure

    rows = [
        (f"{bits},\nprompts of {n}", each) for bits, ns in found.items() for n, each in ns.items()
    ]
    figure = Figure(figsize=(7, 0.9 + 0.55 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = {"alone": "alone", "at_once": "at once, median", "joining": "joining those that write"}
    panels = (
        (left, "speed", {"alone": "one by one", "at_once": "at once"}, "tokens a second"),
        (right, "first", first, "seconds to the first token"),
    )
    colours = {"alone": "0.6", "at_once": "#1f5f8b", "joining": "#e0a030"}
    for axes, what, ways, title in panels:
        for number, (way, label) in enumerate(ways.items()):
            places = [row + (number - (len(ways) - 1) / 2) * 0.27 for row in range(len(rows))]
            values = [each[f"{way}_{what}"] for _, each in rows]
            axes.barh(places, values, height=0.25, color=colours[way], label=label)
        axes.set_yticks(
            range(len(rows)), [name for name, _ in rows] if axes is left else [""] * len(rows)
        )
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(title)
        axes.legend(frameon=False, fontsize="small")
    return figure
