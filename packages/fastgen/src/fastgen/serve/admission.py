"""Who may come in: so many requests at once, and none while the server stops. Next: `prompts`, then `loop`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import overloaded


class Admission:
    """Counts the requests that are being answered.

    Args:
        concurrent: most of them at once.
    """

    def __init__(self, concurrent: int) -> None:
        self._concurrent = concurrent
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_inside = 0
        self.stopping = False

    @contextmanager
    def slot(self) -> Iterator[None]:
        """A place for one request, from before its prompt is read to after its last byte is sent.

        Raises:
            ApiError: 429 where there is none, 503 while the server stops.
        """
        if self.stopping:
            raise overloaded("the server is shutting down; ask another, or this one later", retry_after_s=10)
        if self.num_inside >= self._concurrent:
            raise overloaded(
                f"expected at most {self._concurrent} requests at once, got one more; try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        self.num_inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_inside -= 1
            if not self.num_inside:
                self._idle.set()

    def stop(self) -> None:
        """Let nobody in any more."""
        self.stopping = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nobody is inside; False if somebody still is after `timeout_s`."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            return False
        return True
