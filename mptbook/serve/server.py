"""The HTTP application, and the process that runs it."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Security
from fastapi.responses import FileResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST

from mptbook.serve import chat, completions
from mptbook.serve.errors import STOPPING, Refused, add_handlers
from mptbook.serve.gate import Gate
from mptbook.serve.metrics import Metrics
from mptbook.serve.protocol import PatientProtocol
from mptbook.serve.replies import (
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    documented,
)
from mptbook.serve.requests import ChatRequest, CompletionRequest
from mptbook.serve.served import Served

PAGE = Path(__file__).parent / "page"
TELL = 5  # seconds in which clients may hear that their requests were ended
ALWAYS = 400, 401, 408, 413, 500, 503
ASKED = documented(*ALWAYS, 404, 415, 429)
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"content": {"text/event-stream": {"schema": EVENT}}}


def make_app(served: Served, metrics: Metrics, key: str | None = None) -> FastAPI:
    """What answers HTTP requests.

    The engine of `served` is started and stopped with the app.

    Args:
        metrics: that observes the engine.
        key: that requests must bring; None: they need none.
    """

    @asynccontextmanager
    async def run_engine(app: FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        # What runs was waited for, or its time was up.
        await asyncio.to_thread(served.engine.stop, 0.0)

    app = FastAPI(
        title="mptbook",
        version=version("mptbook"),
        summary="An MPT model behind OpenAI's interface",
        docs_url=None,  # those pages take scripts from elsewhere
        redoc_url=None,
        lifespan=run_engine,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, limits=served.limits, key=key)
    add_handlers(app)
    _add_models(app, served)
    _add_state(app, served, metrics)
    app.mount("/page", StaticFiles(directory=PAGE))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    return app


def _add_models(app: FastAPI, served: Served) -> None:
    bearer = {"dependencies": [Security(HTTPBearer(auto_error=False))]}

    @app.get("/v1/models", responses=documented(*ALWAYS), **bearer)
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[served.card])

    @app.get("/v1/models/{name:path}", responses=documented(*ALWAYS, 404), **bearer)
    async def model(name: str) -> ModelCard:
        served.check_model(name)
        return served.card

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**ASKED, 200: EVENTS},
        **bearer,
    )
    async def complete(asked: CompletionRequest, http: Request) -> Any:
        """Continue texts."""
        return await completions.complete(served, asked, http)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**ASKED, 200: EVENTS},
        **bearer,
    )
    async def answer(asked: ChatRequest, http: Request) -> Any:
        """Answer a conversation."""
        return await chat.answer(served, asked, http)


def _add_state(app: FastAPI, served: Served, metrics: Metrics) -> None:
    @app.get("/health", responses=documented(*ALWAYS))
    async def health() -> Health:
        """Whether requests are answered."""
        if not served.engine.works:
            raise Refused(503, "the engine has stopped")
        return Health()

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**documented(*ALWAYS), 200: {"content": {"text/plain": {}}}},
        dependencies=[Security(HTTPBearer(auto_error=False))],
    )
    async def measurements() -> Response:
        """Measurements for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


class Server(uvicorn.Server):
    """Ends the requests of an engine when their time is up, so that clients are told why.

    uvicorn by itself would cancel its own tasks, which are in no state to tell anything.
    """

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._served = served

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        engine, drain = self._served.engine, self._served.limits.drain
        drained = asyncio.create_task(asyncio.to_thread(engine.stop, drain))
        # Not by the engine: a step of it may take longer than clients are waited for.
        late = Refused(503, STOPPING)
        timer = asyncio.get_running_loop().call_later(drain, self._served.post.refuse_all, late)
        await super().shutdown(sockets)
        timer.cancel()
        await asyncio.to_thread(engine.stop, 0.0)  # at once, if Ctrl-C came again
        await drained
        if self.force_exit:  # and uvicorn has left it out
            await self.lifespan.shutdown()


def server_of(app: FastAPI, served: Served, access_log: bool = False) -> Server:
    """What runs an app: `run(sockets=[...])` answers until SIGTERM or Ctrl-C."""
    limits = served.limits
    patient = type("Patient", (PatientProtocol,), {"patience": limits.patience})
    config = uvicorn.Config(
        app,
        http=patient,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level=logging.INFO if access_log else logging.WARNING,
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=limits.drain + TELL,
    )
    return Server(config, served)


def bound(host: str, port: int) -> socket.socket:
    """A socket that has an address, and does not listen yet.

    Raises:
        ValueError: if it cannot have it.
    """
    own = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
    except (OSError, OverflowError) as error:
        own.close()
        raise ValueError(
            f"cannot listen at {host}, port {port}: {error}; choose another with --port, 0 for "
            "any that is free"
        ) from None
    return own
