"""`mptbook bench prepare`: megabytes of text a second, beside the tokenizer's own speed.

Preparing reads texts, splits off what is held out, tokenizes, lays rows and writes them. The
tokenizer cannot be spared, so its batch speed on the same texts is the bound.
"""

import json
import shutil
import statistics
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import Field, PositiveInt

from mptbook.bench.measure import Bench, in_turns, noise
from mptbook.data.corpora import default_domains, load_domain, read_domain
from mptbook.data.prepare import Prepare, prepare
from mptbook.tokenizer.tokenizer import Tokenizer

BOUND = "tokenizers alone"


class BenchPrepare(Bench):
    """Texts to rows on disk, megabytes per second: `mptbook bench prepare`."""

    tokenizer: str = Field("gpt-neox", description="gpt-neox, a tokenizer.json, or a hub name")
    domains: list[str] = Field([], description="default domains to prepare; none: all")
    repeats: PositiveInt = Field(5, description="rounds; the median is taken")

    def compare(self) -> dict:
        """Seconds, MB/s, and the share of the bound, for each way."""
        with TemporaryDirectory() as scratch:
            return self._compare(Path(scratch))

    def _compare(self, scratch: Path) -> dict:
        domains = self.domains or list(default_domains())
        tokenizer = Tokenizer.load(self.tokenizer)
        source = {name: str(_written(name, scratch)) for name in domains}
        texts = {name: load_domain(name, "train")["text"][:] for name in domains}
        n_bytes = sum(len(text.encode()) for each in texts.values() for text in each)
        runs: dict[str, Callable[[], object]] = {
            BOUND: lambda: [
                tokenizer.backend.encode_batch_fast(each, add_special_tokens=False)
                for each in texts.values()
            ]
        }
        for packing in ("cut", "whole"):
            runs[f"prepare, {packing}"] = _preparing(self.tokenizer, source, packing, scratch)
        seconds = in_turns(runs, self.repeats)
        bound = statistics.median(seconds[BOUND])
        found = {}
        for name, each in seconds.items():
            median = statistics.median(each)
            found[name] = {
                "seconds": each,
                "mb_per_second": n_bytes / 1e6 / median,
                "share": bound / median,
                "noise": noise(each),
            }
            print(f"{name:18} {n_bytes / 1e6 / median:6.2f} MB/s  {bound / median:6.1%}")
        return {"tokenizer": tokenizer.sha256, "bytes": n_bytes, "ways": found}


def _written(name: str, scratch: Path) -> Path:
    """A file of JSON lines with the documents of a default domain."""
    file = scratch / f"{name}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for document in read_domain(name):
            out.write(json.dumps({"text": document.text}) + "\n")
    return file


def _preparing(
    tokenizer: str, source: dict[str, str], packing: str, scratch: Path
) -> Callable[[], None]:
    """A function that prepares afresh, and removes what it wrote."""
    numbers = count()

    def run() -> None:
        out = scratch / f"{packing}-{next(numbers)}"
        prepare(Prepare(out=out, tokenizer=tokenizer, source=source, packing=packing))
        shutil.rmtree(out)

    return run
