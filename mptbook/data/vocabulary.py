"""Learn the vocabulary of the default texts: `mptbook tokenizer`."""

from pathlib import Path

from pydantic import Field

from mptbook.data.corpora import default_domains, load_domain
from mptbook.settings import RunSettings
from mptbook.tokenizer.bpe import measure, train_bpe


class LearnTokenizer(RunSettings):
    """Learn a byte-level BPE on the training split of texts: `mptbook tokenizer`."""

    out: Path = Field(Path("tokenizer.json"), description="file to write")
    vocab_size: int = Field(8192, description="ids, bytes and special tokens included")
    source: dict[str, str] = Field(
        {}, description="domain=SOURCE; without any, the default domains (see mptbook corpora)"
    )

    def run(self) -> None:
        if self.out.exists():
            raise FileExistsError(f"{self.out} exists; remove it or choose another --out")
        sources = self.source or dict.fromkeys(default_domains())
        texts = {name: load_domain(name, "train", at)["text"][:] for name, at in sources.items()}
        tokenizer = train_bpe((text for part in texts.values() for text in part), self.vocab_size)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(self.out)
        for name, at in sources.items():
            fit = measure(tokenizer, load_domain(name, "heldout", at)["text"][:])
            print(f"{name}: {fit.bytes_per_token:.2f} bytes per token, held out")
        print(f"{len(tokenizer):,} ids in {self.out}")
