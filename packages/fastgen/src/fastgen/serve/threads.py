"""Threads beside the event loop, for what would hold it up: tokenizing, compiling, long answers.

Daemons, for nobody can end a call that has begun: one that goes on must not keep a stopped server alive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """Make calls, in the order in which they were asked for; started with the first.

    Args:
        count: calls at once.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]

    async def run(self, function: Callable[[], T]) -> T:
        """What the function returns or raises; cancelled before its turn, it is not called."""
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        answer: Future[T] = Future()
        self._calls.put((answer, function))
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """End the threads, each after the call that it makes."""
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            answer, function = call
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(function())
            except BaseException as error:  # whoever waits for it must hear of it
                answer.set_exception(error)
