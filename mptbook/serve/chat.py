"""/v1/chat/completions: conversations answered, by the model's own template."""

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response

from mptbook.infer.request import Token
from mptbook.serve.replies import ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatMessage
from mptbook.serve.requests import ChatRequest
from mptbook.serve.served import Served
from mptbook.serve.writing import Events, Writing, whole


async def answer(served: Served, asked: ChatRequest, http: Request) -> ChatCompletion | Response:
    """The answer to a conversation; as events, if they are asked for.

    Raises:
        Refused: if it is not answered.
    """
    requests = await served.chat(asked)
    writing = Writing(served.engine, served.post, requests, served.limits.seconds)
    if asked.stream:
        return Events(writing, _pieces(served, asked, writing))
    return await whole(writing, http.receive, _whole(served, asked, writing))


async def _whole(served: Served, asked: ChatRequest, writing: Writing) -> ChatCompletion:
    texts = [""] * asked.n
    tokens: list[list[Token]] = [[] for _ in texts]
    finish = ["length"] * asked.n
    async for number, piece in writing:
        texts[number] += piece.text
        tokens[number] += piece.tokens
        finish[number] = piece.finish or finish[number]
    choices = [
        ChatChoice(
            index=number,
            message=ChatMessage(content=text),
            logprobs=served.words.chat_logprobs(said) if asked.logprobs else None,
            finish_reason=end,
        )
        for number, (text, said, end) in enumerate(zip(texts, tokens, finish, strict=True))
    ]
    return ChatCompletion(**served.about("chatcmpl"), choices=choices, usage=writing.usage(asked.n))


async def _pieces(served: Served, asked: ChatRequest, writing: Writing) -> AsyncIterator[ChatChunk]:
    about = served.about("chatcmpl")
    for number in range(asked.n):
        first = ChatDelta(index=number, delta={"role": "assistant", "content": ""})
        yield ChatChunk(**about, choices=[first])
    async for number, piece in writing:
        logprobs = served.words.chat_logprobs(piece.tokens) if asked.logprobs else None
        if piece.text or piece.finish or (logprobs and logprobs.content):
            delta = ChatDelta(
                index=number,
                delta={"content": piece.text} if piece.text else {},
                logprobs=logprobs,
                finish_reason=piece.finish,
            )
            yield ChatChunk(**about, choices=[delta])
    if asked.include_usage:
        yield ChatChunk(**about, choices=[], usage=writing.usage(asked.n))
