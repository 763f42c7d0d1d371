"""Choices that are being written, from the engine's thread to the server's loop."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from mptbook.infer.engine import Engine
from mptbook.infer.faults import Busy, Stopping, Unanswered
from mptbook.infer.request import Piece, Request, Stream
from mptbook.serve.errors import STOPPING, Refused
from mptbook.serve.replies import PromptDetails, Usage

DONE = b"data: [DONE]\n\n"
SECONDS_TO_RETRY = "2"
log = logging.getLogger(__name__)


class Post:
    """Pieces on their way from an engine's thread to the loop of its server.

    The loop is woken once for all that a step says. Woken for each token, it would take the
    interpreter from the engine, and a core from the next step, as often as there are requests.
    """

    def __init__(self) -> None:
        self.open: set[Writing] = set()
        self._pieces: deque[tuple[asyncio.Queue, tuple[int, Piece | Unanswered]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def listener(self, queue: asyncio.Queue, number: int) -> Callable[[Piece | Unanswered], None]:
        """What the engine tells the pieces of a choice, which come into a queue of this loop."""
        self._loop = asyncio.get_running_loop()

        def tell(piece: Piece | Unanswered) -> None:
            if isinstance(piece, Unanswered):
                log.error("a request failed", exc_info=piece)
            self._pieces.append((queue, (number, piece)))

        return tell

    def deliver(self) -> None:
        """What the engine calls when it has told listeners something."""
        if self._pieces:
            with suppress(RuntimeError):  # the loop has ended, and who waited in it
                self._loop.call_soon_threadsafe(self._hand_out)

    def refuse_all(self, error: Refused) -> None:
        """Tell all who wait for pieces, whatever the engine is doing."""
        for writing in self.open:
            writing.refuse(error)

    def _hand_out(self) -> None:
        while self._pieces:
            queue, piece = self._pieces.popleft()
            queue.put_nowait(piece)


class Writing:
    """All choices of one HTTP request.

    Iterate over it for pairs of a choice's number and its next `Piece`. `close` it whatever
    happens, or slots go on writing for nobody.

    Args:
        requests: one for each choice.
        seconds: they may take at most, waiting included.

    Raises:
        Refused: 400 if one of them does not fit; 429 if too many wait; 503 if the engine ends.
    """

    def __init__(
        self, engine: Engine, post: Post, requests: Sequence[Request], seconds: float
    ) -> None:
        self._pieces: asyncio.Queue[tuple[int, Piece | Unanswered | Refused]] = asyncio.Queue()
        self._open = len(requests)
        self.requests = requests
        self.streams: list[Stream] = []
        self.written = 0  # tokens, without those of prompts
        late = Refused(503, f"it took longer than {seconds:g} s; ask for less")
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, self.refuse, late)
        self._post = post
        post.open.add(self)
        try:
            for number, request in enumerate(requests):
                listener = post.listener(self._pieces, number)
                self.streams.append(engine.submit(request, listener))
        except ValueError as error:
            self.close()
            raise Refused(400, str(error)) from None
        except Busy as error:
            self.close()
            raise Refused(429, str(error), headers={"Retry-After": SECONDS_TO_RETRY}) from None
        except Stopping as error:
            self.close()
            raise Refused(503, str(error)) from None

    def refuse(self, error: Refused) -> None:
        """Have the error raised where pieces are waited for."""
        self._pieces.put_nowait((0, error))

    def close(self) -> None:
        """Have what is not finished given up; may be repeated."""
        self._timer.cancel()
        self._post.open.discard(self)
        for stream in self.streams:
            stream.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        skip = [len(one.prompt) if one.echo else 0 for one in self.requests]
        while self._open:
            number, piece = await self._pieces.get()
            if isinstance(piece, Refused):
                raise piece
            if isinstance(piece, Unanswered):
                raise Refused(500, "the model failed, as the log of the server describes")
            if piece.finish == "cancelled":
                raise Refused(503, STOPPING)
            self._open -= piece.finish is not None
            of_prompt = min(skip[number], len(piece.tokens))
            skip[number] -= of_prompt
            self.written += len(piece.tokens) - of_prompt
            yield number, piece

    def usage(self, n: int) -> Usage:
        """Of all choices so far.

        Args:
            n: choices of each prompt, which is counted once.
        """
        read = sum(len(request.prompt) for request in self.requests[::n])
        reused = sum(stream.prompt_tokens_reused for stream in self.streams[::n])
        return Usage(
            prompt_tokens=read,
            completion_tokens=self.written,
            total_tokens=read + self.written,
            prompt_tokens_details=PromptDetails(cached_tokens=reused),
        )


class Events(StreamingResponse):
    """Server-sent events, of which each is a model as JSON; the last is [DONE].

    An error after the first event is an event of its own: the status is sent by then.
    """

    media_type = "text/event-stream"

    def __init__(self, writing: Writing, models: AsyncIterator[BaseModel]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(models), headers=headers)
        self._writing = writing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also of one who went away before the first event
            self._writing.close()


async def _events(models: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    try:
        async for model in models:
            yield b"data: " + model.model_dump_json().encode() + b"\n\n"
    except Refused as error:
        yield b"data: " + error.response().body + b"\n\n"
    yield DONE


async def whole(
    writing: Writing, receive: Callable[[], Coroutine], work: Coroutine[Any, Any, BaseModel]
) -> BaseModel | Response:
    """What `work` makes of the choices, unless the client goes away first."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        return Response(status_code=499)  # which nobody reads
    finally:
        for task in tasks:
            task.cancel()
        writing.close()


async def _gone(receive: Callable[[], Coroutine]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
