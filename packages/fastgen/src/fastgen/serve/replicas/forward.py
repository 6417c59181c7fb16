"""To a replica and back: a request as it came, its answer as it comes.

What a client stops reading is not read from the replica either; a client that goes away closes the connection to it, by
which the replica notices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable

import httpx2
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import ApiError, overloaded
from ..sse import while_connected

# Of one connection, or made anew on this side; the key was for this side alone.
_NOT_PASSED = frozenset({"authorization", "connection", "content-length", "cookie", "host", "keep-alive"}) | {
    *("proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"),
}
_NOT_RETURNED = frozenset({"connection", "date", "keep-alive", "transfer-encoding"})


async def sent(client: httpx2.AsyncClient, http: Request, body: bytes) -> httpx2.Response:
    """The head of a replica's answer; its body is still to be read.

    Raises:
        httpx2.HTTPError: the replica has ended.
    """
    headers = [(name, value) for name, value in http.headers.items() if name not in _NOT_PASSED]
    url = httpx2.URL(path=http.url.path, query=http.url.query.encode())
    request = client.build_request(http.method, url, headers=headers, content=body)
    return await client.send(request, stream=True)


class Forwarded(Response):
    """A replica's answer, passed on.

    Args:
        answer: whose body is still to be read.
        write_timeout_s: that the client may stand still.
        close: called once, at the end or when the client is gone.
    """

    def __init__(self, answer: httpx2.Response, write_timeout_s: float, close: Callable[[], None]) -> None:
        super().__init__(status_code=answer.status_code)
        self.raw_headers = list(_returned(answer.headers.raw))
        self._answer = answer
        self._write_timeout_s = write_timeout_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await while_connected(receive, self._send(send))
        except ApiError:
            pass  # the client went away: nobody is left to be told
        finally:
            try:
                await self._answer.aclose()
            finally:
                self._close()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._put(send, start)
        try:
            async for part in self._answer.aiter_raw():
                await self._put(send, {"type": "http.response.body", "body": part, "more_body": True})
        except httpx2.HTTPError:
            if not self._answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise
            event = f"data: {json.dumps(gone().as_json())}\n\n".encode()
            await self._put(send, {"type": "http.response.body", "body": event, "more_body": True})
        await self._put(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _put(self, send: Send, message: Message) -> None:
        """Send, or cancel this task if the reader stands still for too long."""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._write_timeout_s, task.cancel)
        try:
            await send(message)
        finally:
            timer.cancel()


def _returned(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    return ((name, value) for name, value in headers if name.decode("latin-1").lower() not in _NOT_RETURNED)


def gone() -> ApiError:
    """The replica that served a request has ended."""
    return overloaded("the replica that served this has ended; try again", code="replica_ended")
