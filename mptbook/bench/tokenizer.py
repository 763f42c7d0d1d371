"""`mptbook bench tokenizer`: megabytes of text per second, beside the libraries underneath.

The library `tokenizers` does the work of all; what is measured is what each puts around it.
Every contestant reads the same `tokenizer.json`, and takes text and gives lists of ids, or the
other way round.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from pydantic import Field, PositiveInt

from mptbook.bench.measure import in_turns, machine, noise, save
from mptbook.bench.peers import OURS
from mptbook.data.corpora import default_domains, load_domain
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

Ids = list[list[int]]


class BenchTokenizer(RunSettings):
    """Text to ids and back, megabytes per second: `mptbook bench tokenizer`."""

    tokenizer: str = Field(
        "gpt-neox", description="gpt-neox, a tokenizer.json, a model directory, or a hub name"
    )
    repeats: PositiveInt = Field(7, description="rounds; the median is taken")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        tokenizer = Tokenizer.load(self.tokenizer)
        texts = heldout_texts()
        results = {"machine": machine(), "repeats": self.repeats, "ids": len(tokenizer)}
        print(f"on {results['machine']['cpu']}, tokenizer of {len(tokenizer):,} ids")
        results |= compare(tokenizer, texts, self.repeats)
        if self.out is not None:
            save(results, self.out)
            print(f"\nwritten to {self.out}")


def heldout_texts() -> list[str]:
    """The held-out texts of all default domains."""
    return [text for name in default_domains() for text in load_domain(name, "heldout")["text"]]


def encoders(tokenizer: Tokenizer, file: Path) -> dict[str, Callable[[Sequence[str]], Ids]]:
    """Name to a function from texts to ids; all but the first read `file`."""
    library, fast = (tokenizers.Tokenizer.from_file(str(file)) for _ in range(2))
    transformer = fast_tokenizer(file)
    plain = {"add_special_tokens": False}
    return {
        OURS: tokenizer.encode_batch,
        "tokenizers": lambda texts: [e.ids for e in library.encode_batch(texts, **plain)],
        "tokenizers, without offsets": lambda texts: [
            e.ids for e in fast.encode_batch_fast(texts, **plain)
        ],
        "transformers": lambda texts: transformer(texts, **plain)["input_ids"],
        f"{OURS}, one at a time": lambda texts: [tokenizer.encode(text) for text in texts],
        "tokenizers, one at a time": lambda texts: [
            library.encode(text, **plain).ids for text in texts
        ],
        "transformers, one at a time": lambda texts: [
            transformer(text, **plain)["input_ids"] for text in texts
        ],
    }


def decoders(tokenizer: Tokenizer, file: Path) -> dict[str, Callable[[Ids], list[str]]]:
    """Name to a function from ids to texts; all but the first read `file`."""
    library = tokenizers.Tokenizer.from_file(str(file))
    transformer = fast_tokenizer(file)
    whole = {"skip_special_tokens": False}
    return {
        f"{OURS}, one at a time": lambda ids: [tokenizer.decode(one) for one in ids],
        "tokenizers": lambda ids: library.decode_batch(ids, **whole),
        "tokenizers, one at a time": lambda ids: [library.decode(one, **whole) for one in ids],
        "transformers": lambda ids: transformer.batch_decode(ids, **whole),
        "transformers, one at a time": lambda ids: [
            transformer.decode(one, **whole) for one in ids
        ],
    }


def fast_tokenizer(file: Path):
    """transformers' tokenizer of a `tokenizer.json`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)


def compare(tokenizer: Tokenizer, texts: list[str], repeats: int = 7) -> dict:
    """Megabytes per second of every encoder and decoder; print a table.

    Args:
        texts: encoded in one call by those that can.
        repeats: rounds, after one that is not timed and must give what mptbook gives.

    Raises:
        ValueError: if two contestants do not agree.
    """
    n_bytes = sum(len(text.encode()) for text in texts)
    ids = tokenizer.encode_batch(texts)
    found = {"texts": len(texts), "bytes": n_bytes, "tokens": sum(map(len, ids))}
    print(f"{len(texts):,} texts, {n_bytes / 1e6:.2f} MB, {found['tokens']:,} tokens")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        tokenizer.save(file)
        both = {
            "encode": (encoders(tokenizer, file), texts, ids),
            "decode": (decoders(tokenizer, file), ids, [tokenizer.decode(one) for one in ids]),
        }
    for direction, (contestants, given, expected) in both.items():
        agree(contestants, given, expected)
        runs = {name: lambda f=f, g=given: f(g) for name, f in contestants.items()}
        found[direction] = rates(in_turns(runs, repeats), n_bytes)
        show(direction, found[direction])
    return found


def agree(contestants: dict[str, Callable], given: list, expected: list) -> None:
    """Make sure that all give what is expected.

    Raises:
        ValueError: naming the first that does not, and where.
    """
    for name, contestant in contestants.items():
        for number, (got, wanted) in enumerate(zip(contestant(given), expected, strict=True)):
            if got != wanted:
                raise ValueError(
                    f"{name} does not agree with mptbook on text {number}; speed of different "
                    "results cannot be compared: take another --tokenizer"
                )


def rates(seconds: dict[str, list[float]], n_bytes: int) -> dict[str, dict]:
    """What is reported of each contestant, as JSON has it; the first is compared with."""
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "seconds": each,
            "noise": noise(each),
            "megabytes_per_second": n_bytes / 1e6 / medians[name],
            "times_mptbook": medians[name] / first,
        }
        for name, each in seconds.items()
    }


def show(direction: str, found: dict[str, dict]) -> None:
    """Print the rates of one direction as a table."""
    print(f"\n{direction:30} {'MB/s':>7} {'noise':>6} {'time, x mptbook':>16}")
    for name, one in found.items():
        spread = "" if one["noise"] is None else f"{one['noise']:.1%}"
        print(
            f"  {name:28} {one['megabytes_per_second']:7.1f} {spread:>6} "
            f"{one['times_mptbook']:16.2f}"
        )
