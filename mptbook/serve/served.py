"""A model that is served: its name, its engine, and how requests become the engine's."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mptbook.infer.engine import Engine
from mptbook.infer.request import Request
from mptbook.serve.errors import Refused
from mptbook.serve.limits import Limits
from mptbook.serve.replies import ModelCard
from mptbook.serve.requests import ChatRequest, CompletionRequest
from mptbook.serve.words import Words
from mptbook.serve.writing import Post
from mptbook.tokenizer.chat import ChatTemplate, check_marks, encode_prompt, stop_ids
from mptbook.tokenizer.tokenizer import Tokenizer

TALK = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]


@dataclass
class Served:
    """All that answering takes.

    Args:
        name: that requests must give.
        engine: started.
        template: how the model reads conversations; None refuses them.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.words = Words(self.tokenizer)
        self.post = Post()
        self.engine.said = self.post.deliver

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            id=self.name,
            created=self.created,
            max_model_len=self.engine.slots.n_tokens,
            chat=None if self.template is None else "turns" if self._takes_turns else "single",
        )

    def about(self, prefix: str) -> dict[str, Any]:
        """What every piece of an answer says of it."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }

    def check_model(self, name: str) -> None:
        """Refuse any other name."""
        if name != self.name:
            raise Refused(
                404,
                f"there is no model {name[:200]!r}; this server has {self.name!r}",
                code="model_not_found",
                param="model",
            )

    async def completions(self, asked: CompletionRequest) -> list[Request]:
        """The engine's requests, n for each prompt.

        Raises:
            Refused: if there are too many, or one is out of bounds.
        """
        self.check_model(asked.model)
        prompts = asked.prompts
        self._check_choices(asked.n, len(prompts))
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if texts:  # which takes time, and lets other threads run
            encoded = await asyncio.to_thread(self.tokenizer.encode_batch, texts)
            prompts = [ids or [self.tokenizer.end_of_text] for ids in encoded]
        self._check_new(asked.max_tokens)
        scores = asked.echo and (asked.logprobs is not None or asked.max_tokens == 0)
        how = {
            "max_new_tokens": asked.max_tokens,
            "logprobs": asked.logprobs,
            "echo": scores,
            "stop_ids": frozenset({self.tokenizer.end_of_text}),
        }
        return [self._request(asked, ids, n, **how) for ids in prompts for n in range(asked.n)]

    async def chat(self, asked: ChatRequest) -> list[Request]:
        """The engine's requests, one for each choice.

        Raises:
            Refused: if the model has no template, or it refuses the conversation.
        """
        self.check_model(asked.model)
        if self.template is None:
            raise Refused(
                400,
                f"{self.name} has no chat template; ask for /v1/completions, or serve a model "
                "that was finetuned on conversations",
                code="no_chat_template",
            )
        self._check_choices(asked.n, 1)
        turns = [message.turn for message in asked.messages]
        try:
            ids = await asyncio.to_thread(self._encode, turns)
        except ValueError as error:
            raise Refused(400, str(error), param="messages") from None
        room = self.engine.slots.n_tokens - len(ids)
        most = asked.most_tokens
        if most is None:
            most = max(1, min(room, self.limits.new_tokens))
        self._check_new(most)
        how = {
            "max_new_tokens": most,
            "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
            "stop_ids": frozenset(stop_ids(self.template, self.tokenizer)),
        }
        mark = (self.template.stop,) if self.template.stop else ()
        return [self._request(asked, ids, n, mark, **how) for n in range(asked.n)]

    @property
    def _takes_turns(self) -> bool:
        try:
            self.template.render(TALK, generation_prompt=True)
        except ValueError:
            return False
        return True

    def _encode(self, turns: Sequence[dict[str, str]]) -> list[int]:
        # In a turn, a mark would become the token that ends it.
        check_marks(turns, self.template, self.tokenizer)
        return encode_prompt(self.template, self.tokenizer, turns)

    def _check_choices(self, n: int, prompts: int) -> None:
        if prompts < 1:
            raise Refused(400, "there is no prompt in the list; give at least one", param="prompt")
        if n * prompts > self.limits.choices:
            raise Refused(
                400,
                f"{prompts} prompts with n={n} are {n * prompts} choices; {self.limits.choices} "
                "are allowed in a request",
                param="n",
            )

    def _check_new(self, most: int) -> None:
        if most > self.limits.new_tokens:
            raise Refused(
                400,
                f"max_tokens is {most}; {self.limits.new_tokens} are allowed",
                param="max_tokens",
            )

    def _request(
        self,
        asked: CompletionRequest | ChatRequest,
        ids: Sequence[int],
        number: int,
        marks: Sequence[str] = (),
        **how: Any,
    ) -> Request:
        if len(asked.stops) > self.limits.stops:
            raise Refused(
                400,
                f"{len(asked.stops)} stop strings; {self.limits.stops} are allowed",
                param="stop",
            )
        if len(ids) + how["max_new_tokens"] > self.engine.slots.n_tokens:
            raise Refused(
                400,
                f"the prompt has {len(ids)} tokens, and up to {how['max_new_tokens']} more are "
                f"asked for, but the model has room for {self.engine.slots.n_tokens}; shorten the "
                "prompt, or ask for fewer",
                code="context_length_exceeded",
            )
        # Each choice has a seed of its own, or all would be the same text.
        seed = None if asked.seed is None else (asked.seed + number + 2**63) % 2**64 - 2**63
        try:
            return Request(
                tuple(ids),
                temperature=asked.temperature,
                top_p=None if asked.top_p == 1 else asked.top_p,
                top_k=asked.top_k,
                seed=seed,
                stop=(*asked.stops, *marks),
                **how,
            )
        except ValueError as error:
            raise Refused(400, str(error)) from None
