"""What stands before the routes: the server's name, the key, the size of the body, headers of every answer.

Each is a plain ASGI wrapper, so that streams and disconnects pass through untouched. `Guard` puts them in order: a
body is not read before the key is known to fit. Next: `app`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, internal
from .limits import ServerConfig

logger = logging.getLogger(__name__)

# Answered without a key: they say nothing of the model or its users, and load balancers and browsers have none.
OPEN_PATHS = frozenset({"/", "/health", "/favicon.ico"})
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """The application behind everything that `config` asks for.

    Args:
        app: the application.
        config: see `ServerConfig`.
        answered: is told each answer's route and status.
    """

    def __init__(self, app: ASGIApp, *, config: ServerConfig, answered: Callable[[str, int], None]) -> None:
        app = BodyLimit(app, config.limits.body_bytes, config.limits.read_timeout_s)
        if config.api_keys:
            app = ApiKeys(app, config.api_keys)
        if config.cors_origins:
            app = CORSMiddleware(app, config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
        if config.hosts is not None:
            app = Hosts(app, config.hosts)
        self._app = app
        self._answered = answered
        self._headers = dict(SECURITY_HEADERS)
        if config.cors_origins:  # other pages may read answers: CORS decides which
            del self._headers["Cross-Origin-Resource-Policy"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through; adds headers to its answer, and makes an error of what nobody caught."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(self._headers)
                self._answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            if started:
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await internal().response()(scope, receive, send_with_headers)


class Hosts:
    """Refuses requests to a name that is not the server's."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through, or answer 421."""
        if scope["type"] == "http":
            host = without_port(Headers(scope=scope).get("host", "")).lower()
            if host not in self._hosts:
                names = ", ".join(sorted(self._hosts))
                error = ApiError(
                    421,
                    f"expected one of the hosts {names}, got {host!r}; start the server with --allowed-host",
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def without_port(host: str) -> str:
    """`example.org` of `example.org:80`; an IPv6 address keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and (not name.startswith("[") or name.endswith("]")) else host


class ApiKeys:
    """Asks for one of the keys as a bearer token, except on `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._fits(scope):
            error = ApiError(
                401,
                "expected an API key of this server, got none or another; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fits(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        # Every key is compared, in constant time: how long it takes says nothing.
        fits = [hmac.compare_digest(given, each) for each in self._keys]
        return any(fits) and kind.lower() == "bearer"


class BodyLimit:
    """Reads a request's body, as far as it is allowed to go, before the application sees the request."""

    def __init__(self, app: ASGIApp, limit_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request through, or answer 408 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            declared = Headers(scope=scope).get("content-length", "0")
            self._check(int(declared) if declared.isdigit() else 0)
            body = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            error = ApiError(408, f"expected the whole body within {self._timeout_s:g} s, got less")
            error.headers["Connection"] = "close"
            await error.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._limit_bytes:
            raise ApiError(
                413, f"expected a body of at most {self._limit_bytes} bytes, got more", code="body_too_large"
            )

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None if the client went away before its end."""
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            num_bytes += len(part)
            self._check(num_bytes)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what else comes: only a disconnect can."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again
