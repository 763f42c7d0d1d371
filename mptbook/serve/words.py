"""Tokens one by one, as their log-probabilities are reported: text, bytes, and where they stand."""

from collections.abc import Sequence
from functools import lru_cache

from mptbook.infer.request import Token
from mptbook.infer.text import HALF
from mptbook.serve.replies import ChatLogprob, ChatLogprobs, Logprobs, TopLogprob
from mptbook.tokenizer.tokenizer import Tokenizer


class Words:
    """The bytes and the text of single tokens.

    A token may be a part of a character. Its text is then `bytes:` and its bytes in hexadecimal,
    as OpenAI's completions have it, so that no two tokens are written alike.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def bytes(self, token: int) -> bytes:
        text = self._tokenizer.decode([token])
        if HALF not in text:
            return text.encode()
        spelled = self._tokenizer.backend.id_to_token(token) or ""
        letters = _byte_letters()
        return bytes(letters[letter] for letter in spelled if letter in letters)

    def text(self, token: int) -> str:
        written = self.bytes(token)
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)

    def logprobs(self, tokens: Sequence[Token], offset: int = 0) -> tuple[Logprobs, int]:
        """In the shape of completions.

        Args:
            offset: characters of the text before the first of the tokens.

        Returns:
            Log-probabilities, and the offset after the last of the tokens.
        """
        found = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            top = None
            if token.logprob is not None:
                top = {self.text(id): nats for id, nats in token.top}
                top[self.text(token.id)] = token.logprob  # one more, if it is not among them
            found.tokens.append(self.text(token.id))
            found.token_logprobs.append(token.logprob)
            found.top_logprobs.append(top)
            found.text_offset.append(offset)
            # A character is counted with its first byte: the others are 10xxxxxx in UTF-8.
            offset += sum(byte & 0xC0 != 0x80 for byte in self.bytes(token.id))
        return found, offset

    def chat_logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs:
        """In the shape of chats."""

        def one(token: int, nats: float | None) -> dict:
            return {
                "token": self.text(token),
                "logprob": nats,
                "bytes": list(self.bytes(token)),
            }

        return ChatLogprobs(
            content=[
                ChatLogprob(
                    **one(token.id, token.logprob),
                    top_logprobs=[TopLogprob(**one(*pair)) for pair in token.top],
                )
                for token in tokens
            ]
        )


@lru_cache
def _byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for, as GPT-2 chose them.

    Printable bytes stand for themselves; the others for letters from U+0100 on, in order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
