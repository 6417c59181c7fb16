"""A thread that does what a hook has begun while backward goes on.

In: tasks, from DDP's hooks on the CPU. Out: futures of their results. One after another: all ranks are given the same
tasks in the same order, and so never wait for each other in different ones.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

import torch

_Tasks: TypeAlias = (
    "SimpleQueue[tuple[Callable[[], torch.Tensor], torch.futures.Future[torch.Tensor]] | None]"
)


class Worker:
    """A thread that takes one task after another; it ends with this object."""

    def __init__(self) -> None:
        self._tasks: _Tasks = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._tasks.put, None)

    def add(self, task: Callable[[], torch.Tensor]) -> torch.futures.Future[torch.Tensor]:
        """Have `task` done after those before it; DDP raises what it raises, where it waits."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=_work, args=(self._tasks,), name="comm_compress", daemon=True
            )
            self._thread.start()
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._tasks.put((task, future))
        return future


def _work(tasks: _Tasks) -> None:
    while (item := tasks.get()) is not None:
        task, future = item
        try:
            result = task()
        except Exception as error:
            future.set_exception(error)  # type: ignore[arg-type]  # torch's annotation is wrong
        else:
            future.set_result(result)
        del item, task, future
