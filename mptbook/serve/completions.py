"""/v1/completions: texts continued."""

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response

from mptbook.infer.request import Token
from mptbook.serve.replies import Completion, CompletionChoice
from mptbook.serve.requests import CompletionRequest
from mptbook.serve.served import Served
from mptbook.serve.writing import Events, Writing, whole


async def complete(
    served: Served, asked: CompletionRequest, http: Request
) -> Completion | Response:
    """The answer to a request; as events, if it asks for them.

    Raises:
        Refused: if it is not answered.
    """
    requests = await served.completions(asked)
    writing = Writing(served.engine, served.post, requests, served.limits.seconds)
    if asked.stream:
        return Events(writing, _pieces(served, asked, writing))
    return await whole(writing, http.receive, _whole(served, asked, writing))


async def _whole(served: Served, asked: CompletionRequest, writing: Writing) -> Completion:
    texts = [_echoed(served, asked, writing, number) for number in range(len(writing.requests))]
    tokens: list[list[Token]] = [[] for _ in texts]
    finish = ["length"] * len(texts)
    async for number, piece in writing:
        texts[number] += piece.text
        tokens[number] += piece.tokens
        finish[number] = piece.finish or finish[number]
    choices = [
        CompletionChoice(
            index=number,
            text=text,
            logprobs=served.words.logprobs(said)[0] if asked.logprobs is not None else None,
            finish_reason=end,
        )
        for number, (text, said, end) in enumerate(zip(texts, tokens, finish, strict=True))
    ]
    return Completion(**served.about("cmpl"), choices=choices, usage=writing.usage(asked.n))


async def _pieces(
    served: Served, asked: CompletionRequest, writing: Writing
) -> AsyncIterator[Completion]:
    about = served.about("cmpl")
    echoed = [_echoed(served, asked, writing, number) for number in range(len(writing.requests))]
    offsets = [0] * len(echoed)
    async for number, piece in writing:
        text, echoed[number] = echoed[number] + piece.text, ""
        logprobs = None
        if asked.logprobs is not None:
            logprobs, offsets[number] = served.words.logprobs(piece.tokens, offsets[number])
        if text or piece.finish or (logprobs and logprobs.tokens):
            choice = CompletionChoice(
                index=number, text=text, logprobs=logprobs, finish_reason=piece.finish
            )
            yield Completion(**about, choices=[choice])
    if asked.include_usage:
        yield Completion(**about, choices=[], usage=writing.usage(asked.n))


def _echoed(served: Served, asked: CompletionRequest, writing: Writing, number: int) -> str:
    return served.tokenizer.decode(writing.requests[number].prompt) if asked.echo else ""
