"""Errors as a client sees them: OpenAI's JSON shape, with the HTTP status that fits.

Raised anywhere in `serve`, sent by `app`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..errors import FastgenError

# OpenAI's `type` for each status that this server sends.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(FastgenError, RuntimeError):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: for a person.
        code: for a program, such as `context_length_exceeded`.
        param: the field at fault.
        headers: to send along.
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
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def as_json(self) -> dict[str, Any]:
        """The body that is sent."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> Response:
        """The whole answer. Plain ASCII, for messages quote what clients send."""
        body = json.dumps(self.as_json())
        return Response(body, self.status, self.headers, media_type="application/json")


def overloaded(
    message: str, *, status: int = 503, code: str = "overloaded", retry_after_s: int = 1
) -> ApiError:
    """The server has too much to do (429, 503) or stops (503): the client may try again."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(retry_after_s)})


def internal() -> ApiError:
    """Something that nobody expected (500): whoever catches it logs it."""
    return ApiError(500, "the server failed at this request; its log says more", code="internal_error")


def bad(param: str, message: str) -> ApiError:
    """A field that asks for what cannot be (400)."""
    return ApiError(400, f"{param}: {message}", param=param)
