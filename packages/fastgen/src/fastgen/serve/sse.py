"""Sending a stream of answers as server-sent events, and noticing that nobody listens any more.

In: a `Stream` and the `Answers` that turn its pieces into chunks. Several pieces that wait are sent in one go. A
reader that stands still stops this task, not the engine: `Stream` merges what comes meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .answer_schemas import Answer, dumped
from .answers import Answers, has_many_logprobs
from .errors import ApiError, internal, overloaded
from .stream import Stream

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = 15.0  # proxies cut connections that say nothing for a minute; a comment is no event
T = TypeVar("T")


async def while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    timeout_s: float | None = None,
    over: asyncio.Event | None = None,
) -> T:
    """Run `work` as long as its client is there.

    Raises:
        ApiError: 499 if the client went away, 504 after `timeout_s`, 503 if the server is `over`; `work` is cancelled
            then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    ends: set[asyncio.Future[Any]] = {leaving}
    if over is not None:
        ends.add(asyncio.ensure_future(over.wait()))
    try:
        await asyncio.wait({working, *ends}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ApiError(499, "the client went away")
        if over is not None and over.is_set():
            raise overloaded("the server is shutting down", retry_after_s=10)
        raise late(timeout_s or 0.0)
    finally:
        for each in (working, *ends):
            each.cancel()
        await asyncio.gather(working, *ends, return_exceptions=True)


def late(timeout_s: float) -> ApiError:
    """A request took too long."""
    return ApiError(504, f"expected the request to end within {timeout_s:g} s, it did not", code="timeout")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of answers as an HTTP response.

    Args:
        stream: read to its end.
        answers: turn its pieces into chunks.
        describe: turns what the stream raises into an error to send; raises what it does not know.
        in_thread: runs what would hold up the event loop.
        write_timeout_s: that a reader may stand still.
        close: called when all is sent, or cannot be.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        stream: Stream,
        answers: Answers,
        *,
        describe: Callable[[Exception], ApiError],
        in_thread: Callable[[Callable[[], bytes]], Awaitable[bytes]],
        write_timeout_s: float,
        close: Callable[[], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._answers = answers
        self._describe = describe
        self._in_thread = in_thread
        self._write_timeout_s = write_timeout_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await while_connected(receive, self._send(send))
        except ApiError:
            pass  # the client went away: nobody is left to be told
        finally:
            self._close()

    async def _send(self, send: Send) -> None:
        await self._put(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        more = True
        while more:
            if not await self._stream.wait(KEEP_ALIVE_S):
                body = b": still at work\n\n"
            else:
                body, more = await self._events()
            await self._put(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _events(self) -> tuple[bytes, bool]:
        """What there is to send, and whether more comes."""
        try:
            pieces = await self._stream.read()
            if not pieces:
                return _events(self._answers.last_chunks()) + _event("[DONE]"), False
            if has_many_logprobs(pieces):
                return await self._in_thread(lambda: _events(self._answers.chunks(pieces))), True
            return _events(self._answers.chunks(pieces)), True
        except Exception as error:
            return _event(json.dumps(self._told(error).as_json())), False

    def _told(self, error: Exception) -> ApiError:
        try:
            return self._describe(error)
        except Exception:
            logger.exception("a stream failed")
            return internal()

    async def _put(self, send: Send, message: Message) -> None:
        """Send, or cancel this task if the reader stands still for too long."""
        task = asyncio.current_task()
        assert task is not None
        timer = asyncio.get_running_loop().call_later(self._write_timeout_s, task.cancel)
        try:
            await send(message)
        finally:
            timer.cancel()


def _events(answers: Sequence[Answer]) -> bytes:
    return b"".join(_event(dumped(answer)) for answer in answers)


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
