"""Tokens to text, piece by piece, as soon as a piece is certain."""

from collections.abc import Sequence

from mptbook.tokenizer.tokenizer import Tokenizer

HALF = "\ufffd"  # what bytes become that are no character, or not yet


class TextStream:
    """The text of tokens that come one at a time.

    A token may end within a character, and text may be the beginning of a stop string: such text
    waits for the next token. Pieces put together are the decoded tokens, up to the first stop
    string.

    Args:
        stop: strings that end the text; they are no part of it.

    Attributes:
        stopped: the stop string that came, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._ids: list[int] = []  # whose text is not certain yet
        self._held = ""  # certain, but perhaps the beginning of a stop string
        self.stopped: str | None = None

    def add(self, token: int) -> str:
        """Text that is certain now and was not before; nothing after a stop string."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(HALF):
            return ""
        self._ids.clear()
        return self._let_go(text)

    def finish(self) -> str:
        """What still waited, when no more tokens come."""
        text = self._tokenizer.decode(self._ids)
        self._ids.clear()
        text = self._let_go(text)
        rest, self._held = self._held, ""
        return text + rest

    def _let_go(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + text
        places = [(text.find(string), string) for string in self._stop if string in text]
        if places:
            place, self.stopped = min(places)
            self._held = ""
            return text[:place]
        longest = max((len(string) for string in self._stop), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-size:]) for string in self._stop):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise a ValueError if a tokenizer has ids that a model lacks."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the model {vocab_size}; take the tokenizer "
            "that it was trained with"
        )
