"""What every request passes before it is answered: host, key, size and patience.

A request is refused here by its headers, before its body is read, and no body is ever larger in
memory than `Limits.body_bytes`.
"""

import asyncio
import hashlib
import hmac
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from mptbook.serve.errors import STOPPING, Refused
from mptbook.serve.limits import Limits

LOCAL = "localhost", "127.0.0.1", "[::1]"
OPEN = "/health", "/"  # and what the page at / is made of; nothing of it is secret
PAGE = "/page/"
WATCHED = "/health", "/metrics"  # by those who would restart a server that is merely full
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Gate:
    """An ASGI app in front of another.

    Args:
        key: that requests must bring as `Authorization: Bearer KEY`. None: they need none, but
            must be addressed to this machine by a name of its own, or a page of elsewhere whose
            name was made to point here could ask, too.
    """

    def __init__(self, app: Any, limits: Limits, key: str | None) -> None:
        self._app, self._limits = app, limits
        self._key = None if key is None else _digest(key.encode())
        self._requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False

        async def with_headers(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        self._requests += 1
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            body = await self._body(receive)
            await self._app(scope, _replayed(body, receive), with_headers)
        except Refused as error:
            await error.response()(scope, receive, with_headers)
        except asyncio.CancelledError:  # by uvicorn, when the server stops and has waited enough
            if not started:
                await Refused(503, STOPPING).response()(scope, receive, with_headers)
        finally:
            self._requests -= 1

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if self._requests > self._limits.requests and path not in WATCHED:
            raise Refused(
                503,
                f"{self._limits.requests} requests are being answered; ask again later",
                headers={"Retry-After": "2"},
            )
        if self._key is None:
            host = headers.get("host", "").rpartition(":")
            name = host[0] if host[2].isdecimal() else headers.get("host", "")
            if name.lower() not in LOCAL:
                raise Refused(
                    400,
                    "the header Host names another machine; without a key this server answers "
                    f"{', '.join(LOCAL)} only",
                )
        elif path not in OPEN and not path.startswith(PAGE):
            self._check_key(headers.get("authorization", ""))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Anything else a page of elsewhere could send without asking.
        if method == "POST" and kind != "application/json":
            raise Refused(415, f"the body is {kind or 'of no type'}; send application/json")
        size = headers.get("content-length", "0")
        if size.isdecimal() and int(size) > self._limits.body_bytes:
            raise self._too_large()

    def _check_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        # Digests are equally long, and all of them is compared: time says nothing of the key.
        same = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._key)
        if scheme.lower() != "bearer" or not same:
            raise Refused(
                401,
                "the key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, receive: Any) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.patience):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):  # or the client is gone
                        return bytes(body)
        except TimeoutError:
            raise Refused(
                408, f"the body did not come within {self._limits.patience:g} s"
            ) from None

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._limits.body_bytes} bytes")


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body at once, and then what else comes."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
