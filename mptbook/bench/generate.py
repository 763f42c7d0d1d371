"""`mptbook bench generate`: tokens a second of one and of several sequences, beside peers.

Writing a token reads every weight, so memory sets a bound: the bytes of the weights over the
speed at which memory is read. The time of a token is that of many tokens less that of one, after
the same prompts, over the tokens between.
"""

import statistics
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from mptbook.bench.measure import Bench, noise, rotated
from mptbook.bench.workers import Worker
from mptbook.bench.writers import (
    ctranslate2_mpt,
    llama_cpp_mpt,
    memory,
    ours,
    transformers_mpt,
)
from mptbook.infer.quantize import Bits
from mptbook.model.config import MPTConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY = "memory"
PEERS = {  # name in figures, what makes it of which weights, and the package it is in
    "transformers": ("transformers' MPT, bfloat16", transformers_mpt, "bfloat16", "transformers"),
    "ctranslate2": ("CTranslate2, 8 bits", ctranslate2_mpt, "int8", "ctranslate2"),
    "llama.cpp-bf16": ("llama.cpp, bfloat16", llama_cpp_mpt, "bf16", "xllamacpp"),
    "llama.cpp-q4_0": ("llama.cpp, 4 bits", llama_cpp_mpt, "q4_0", "xllamacpp"),
}


class BenchGenerate(Bench):
    """Write with random weights, interleaved with peers: `mptbook bench generate`."""

    model: str = Field("mpt-125m", description="a named size")
    bits: list[Bits] = Field([16, 8, 4], description="of our weights")
    peers: list[Literal["transformers", "ctranslate2", "llama.cpp-bf16", "llama.cpp-q4_0"]] = Field(
        list(PEERS), description="libraries to compare with; [] for none"
    )
    sequences: list[PositiveInt] = Field([1, 8], description="written at the same time")
    prompt_tokens: PositiveInt = Field(8, description="of each, read before")
    new_tokens: int = Field(33, ge=2, description="written to each")
    long_prompt: PositiveInt = Field(512, description="tokens of the prompt whose reading is timed")
    repeats: PositiveInt = Field(5, description="rounds; medians are shown")
    figure: Path | None = Field(None, description="where to draw the figures")

    def compare(self) -> dict:
        """The figures, as JSON has them."""
        config = MPTConfig.named(self.model)
        makers = {f"mptbook, {bits} bits": (ours, config, bits) for bits in self.bits}
        for peer in self.peers:
            name, make, weights, package = PEERS[peer]
            if find_spec(package) is None:
                raise ValueError(
                    f"{peer} is in the package {package}, which is not here; pip install "
                    "'mptbook[bench]', or name other --peers"
                )
            makers[name] = make, config, weights
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(Worker(name, *maker)) for name, maker in makers.items()
            }
            reading = stack.enter_context(Worker(MEMORY, memory, ""))
            found = {name: {} for name in makers}
            for name in list(makers)[: len(self.bits)]:
                found[name] = workers[name].ask()
                print(
                    f"{name}: {found[name]['weight_bytes'] / 1e9:.2f} GB of weights made in "
                    f"{found[name]['seconds']:.0f} s, "
                    f"{found[name]['peak_bytes'] / 1e9:.2f} GB at most"
                )
            taken = self._take_turns(workers, reading)
        speeds = [speed for times in taken.values() for speed in times[MEMORY]]
        read, least, most = statistics.median(speeds), min(speeds), max(speeds)
        for name, times in taken.items():
            found[name] |= self._figures(times, found[name].get("weight_bytes"))
        print(
            f"\nmemory is read at {read / 1e9:.1f} GB/s; it was {least / 1e9:.1f} to "
            f"{most / 1e9:.1f} while this ran"
        )
        self._show(found)
        if self.figure is not None:
            plot(found).savefig(self.figure)
        settings = self.model_dump(mode="json", exclude={"out", "figure"})
        speed = {"bytes_per_second": read, "bytes_per_second_range": [least, most]}
        return {"settings": settings, **speed, "contestants": found}

    def _take_turns(self, workers: dict[str, Worker], reading: Worker) -> dict:
        """For each contestant, seconds of each question in each round; and the bytes per second
        that memory gave just before, which are not always as many on a machine that is shared."""
        questions = [(self.long_prompt, 1, 1)]
        questions += [
            (self.prompt_tokens, n, tokens)
            for n in self.sequences
            for tokens in (1, self.new_tokens)
        ]
        taken = {name: {question: [] for question in [MEMORY, *questions]} for name in workers}
        for turn in range(1 + self.repeats):  # the first compiles and warms up
            for name in rotated(workers, turn):
                speed = reading.ask()
                if turn:
                    taken[name][MEMORY].append(speed)
                for tokens, n, new in questions:
                    seconds = workers[name].ask(n, tokens, new)
                    if turn:
                        taken[name][tokens, n, new].append(seconds)
            print(f"round {turn} of {self.repeats}", file=sys.stderr)
        return taken

    def _figures(self, times: dict, weight_bytes: int | None) -> dict:
        """Of one contestant: medians, noise, and the share of what memory allows."""
        prompt = times[self.long_prompt, 1, 1]
        found = {"prompt": {"seconds": statistics.median(prompt), "noise": noise(prompt)}}
        for n in self.sequences:
            pairs = zip(
                times[self.prompt_tokens, n, self.new_tokens],
                times[self.prompt_tokens, n, 1],
                strict=True,
            )
            steps = [(long - short) / (self.new_tokens - 1) for long, short in pairs]
            step = statistics.median(steps)
            found[str(n)] = {"seconds": step, "noise": noise(steps), "tokens_per_second": n / step}
            if weight_bytes is not None:
                rounds = zip(times[MEMORY], steps, strict=True)
                shares = [weight_bytes / speed / seconds for speed, seconds in rounds]
                found[str(n)]["share_of_memory"] = statistics.median(shares)
        return found

    def _show(self, found: dict) -> None:
        heads = "".join(f"{f'{n} at once':>14} {'noise':>6}" for n in self.sequences)
        print(
            f"{'tokens a second':30}{heads} {'of memory':>10} {f'prompt of {self.long_prompt}':>15}"
        )
        for name, each in found.items():
            cells = [each[str(n)] for n in self.sequences]
            row = "".join(f"{c['tokens_per_second']:14,.1f} {c['noise'] or 0:6.1%}" for c in cells)
            share = cells[0].get("share_of_memory")
            share = "" if share is None else f"{share:.0%}"
            print(f"{name:30}{row} {share:>10} {each['prompt']['seconds']:13.2f} s")


def plot(found: dict) -> "Figure":
    """Tokens a second of each contestant, a panel for each number of sequences."""
    from matplotlib.figure import Figure

    counts = [n for n in next(iter(found.values())) if n.isdigit()]
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(found)), layout="constrained")
    for n, axes in zip(counts, figure.subplots(1, len(counts), squeeze=False)[0], strict=True):
        speeds = [each[n]["tokens_per_second"] for each in found.values()]
        colours = ["C0" if name.startswith("mptbook") else "0.6" for name in found]
        axes.barh(range(len(found)), speeds, color=colours)
        axes.set_yticks(range(len(found)), found if n == counts[0] else [""] * len(found))
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{n} at once", fontsize="medium")
        axes.set_xlabel("tokens a second")
    return figure
