"""What a run looks at between steps: bits per byte of held-out text, and a sample."""

from pathlib import Path

from mptbook.data.shards import read_table
from mptbook.eval.perplexity import Prediction, perplexity
from mptbook.infer.generate import generate
from mptbook.model.mpt import MPT
from mptbook.model.precision import Precision
from mptbook.tokenizer.tokenizer import Tokenizer
from mptbook.train.log import RunLog


def load_heldout(data: Path) -> dict[str, list[str]]:
    """The held-out texts of each domain of a prepared folder.

    Raises:
        ValueError: if a file of them is damaged.
    """
    files = sorted((data / "heldout").glob("*.arrow"))
    return {file.stem: read_table(file)["text"][:] for file in files}


def front(heldout: dict[str, list[str]], n_characters: int) -> dict[str, list[str]]:
    """Of each domain the texts from the front, the last one cut, with so many characters."""
    return {domain: _first(texts, n_characters) for domain, texts in heldout.items()}


def measure(
    log: RunLog,
    kind: str,
    step: int,
    model: MPT,
    tokenizer: Tokenizer,
    heldout: dict[str, list[str]],
    precision: Precision,
) -> None:
    """Log the bits per byte of each domain and of all together."""
    found = {
        domain: perplexity(model, tokenizer, texts, precision=precision)
        for domain, texts in heldout.items()
    }
    total = sum(found.values(), start=Prediction(0.0, 0, 0))
    domains = {domain: prediction.bits_per_byte for domain, prediction in found.items()}
    log.heldout(kind, step, total.bits_per_byte, domains)


def sample(log: RunLog, step: int, model: MPT, tokenizer: Tokenizer, prompt: str) -> None:
    """Log how the model continues a prompt."""
    text = generate(model, tokenizer, prompt, max_new_tokens=48, temperature=0.8)[0]
    log.sample(step, prompt, text)


def _first(texts: list[str], n_characters: int) -> list[str]:
    kept = []
    for text in texts:
        kept.append(text[:n_characters])
        n_characters -= len(kept[-1])
        if n_characters <= 0:
            break
    return kept
