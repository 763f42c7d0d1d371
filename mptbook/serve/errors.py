"""Errors as OpenAI's clients understand them: {"error": {"message", "type", "param", "code"}}."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger(__name__)

STOPPING = "the server is stopping; ask another, or later"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for a person to read.
        code: for a program to read, or None.
        param: the field that is wrong, or None.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Have an app answer every error with the error object."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _mistake(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"there is nothing at {request.url.path}", "not_found"
        if error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        if error.status_code == 400:  # the only one that FastAPI raises itself
            message, code = "the body is no JSON in UTF-8, or none of bounded depth", "invalid_json"
        return Refused(error.status_code, message, code=code, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again after this response, so that uvicorn logs it.
        return Refused(500, "an error of the server, which its log describes").response()


def _mistake(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The first mistake in a body, in one line that names the field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", "")
        return Refused(400, f"the body is not JSON: {why}", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if not place:  # of several fields, or no object at all
        own = first["type"] == "together"
        return Refused(400, first["msg"] if own else "the body must be a JSON object")
    if first["type"] == "missing":
        return Refused(400, f"{param} is missing", param=param)
    if first["type"] == "extra_forbidden":
        return Refused(
            400, f"{param} is not supported; leave it out", param=param, code="unsupported_field"
        )
    if first["type"] == "unsupported":
        said = f"{param} {first['msg']}"
        return Refused(400, said, param=param, code="unsupported_field")
    said = first["msg"][:1].lower() + first["msg"][1:]
    return Refused(400, f"{param}: {said}", param=param)
