"""Connections that bring no request: closed in time, for each holds a socket, and a process has few.

In: uvicorn's protocol, which waits for ever for the head of a request. Out: one that does not. What comes after the
head is `guard`'s.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def patient(timeout_s: float) -> type[asyncio.Protocol]:
    """An HTTP protocol that closes connections on which no request begins.

    Args:
        timeout_s: from the connection, or from the first byte after an answer, to the last byte of a request's head.
    """

    class Patient(cast(Any, AutoHTTPProtocol)):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:
                self._wait()
            else:
                self._wait_no_longer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_longer()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(timeout_s, self.transport.close)

        def _wait_no_longer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return cast(type[asyncio.Protocol], Patient)
