"""The one form of every error that the server answers, which clients of the OpenAI API read too."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lavic.errors import ChangedFileError, LavicError

log = logging.getLogger(__name__)

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "overloaded",
    499: "client_closed_request",
    500: "internal_error",
    503: "unavailable",
}


NO_JSON = "the body is not JSON"
_PARTS = ("conversation", "messages", "candidates", "k", "exclude")
"""Parts of a request that the recommender's refusals name first."""
_FORM = re.compile(r".*\[.*|str|Message")
"""What pydantic puts into a place for a form that a value may have, as `list[union[Message,str]]`."""


class ApiError(Exception):
    """An error answer.

    Args:
        status: HTTP status.
        message: What is wrong and what to do, one line.
        param: The part of the request that is wrong, as `candidates`.
        headers: Of the answer.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    @property
    def response(self) -> JSONResponse:
        """The answer: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "invalid_request_error" if self.status < 500 and self.status not in (429, 499) else "server_error"
        code = _CODES.get(self.status, str(self.status))
        body = {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}
        return JSONResponse(body, self.status, self.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Makes an app answer every error in this form."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(LavicError)
    async def lavic_error(request: Request, error: LavicError) -> JSONResponse:
        return from_lavic_error(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Neither the input nor a context is repeated: they may be large, or numbers that JSON does not have.
        problems = error.errors()
        if problems[0]["type"] == "json_invalid":
            return ApiError(400, NO_JSON).response
        # Each form that a value may have gives a problem: the deepest one is of the form that was meant.
        deepest = max(problems, key=lambda problem: len(problem["loc"]))
        param = _param(deepest["loc"])
        reasons = dict.fromkeys(problem["msg"] for problem in problems if _param(problem["loc"]) == param)
        message = " or ".join(f"{reason[:1].lower()}{reason[1:]}" for reason in reasons)
        return ApiError(422, f"{param or 'body'}: {message}", param=param).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        # FastAPI's own 400 is of a body that Python's parser fails at, such as one that is nested too deep.
        message = NO_JSON if error.status_code == 400 else str(error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; clients learn nothing of it. uvicorn closes the connection.
        return ApiError(500, "the server failed; its log says why", headers={"Connection": "close"}).response


def _param(location: Sequence[str | int]) -> str | None:
    """A place in a body as clients see it: `conversation.0.content`."""
    keys = [str(part) for number, part in enumerate(location[1:]) if number == 0 or not _FORM.fullmatch(str(part))]
    return ".".join(keys) or None


def from_lavic_error(error: LavicError) -> ApiError:
    """A refusal of the recommender as an answer: what it says begins with the part of the request that is wrong."""
    if isinstance(error, ChangedFileError):
        log.error("%s", error)
        return ApiError(503, "an item store's or index's file was changed; the server's log says which")
    message = str(error)
    subject, colon, _ = message.partition(":")
    param = subject if colon and subject.partition("[")[0] in _PARTS else None
    return ApiError(422, message, param=param)
