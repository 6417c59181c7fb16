"""One thread that does work while training goes on.

In: calls, in order. Out: a `Job` for each, to be waited for. What one raises is raised by whoever waits for it and by
`check`, from then on and every time: nothing that follows a failed job can be trusted, and none runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from .errors import OffloadStateError


class Job:
    """Work under way."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            BaseException: what the work, or work before it, raised.
        """
        self._future.result()

    def is_done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._future.done()


class Background:
    """A thread, made at the first `submit`; it ends with `close`, or with this object."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._failure: BaseException | None = None
        self._closed = False

    def submit(self, work: Callable[[], None]) -> Job:
        """Have `work` done after all that was submitted before.

        Raises:
            OffloadStateError: this is closed.
        """
        self.check_open()
        return Job(self._pool.submit(self._run, work))

    def check_open(self) -> None:
        """Raise if this is closed."""
        if self._closed:
            raise OffloadStateError("the optimizer is closed: its thread has ended; build a new one")

    def check(self) -> None:
        """Raise what a job has raised, if one has."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread when all jobs are done; raises what one of them has raised."""
        self._closed = True
        self._pool.shutdown(wait=True)
        self.check()

    def _run(self, work: Callable[[], None]) -> None:
        self.check()
        try:
            work()
        except BaseException as error:
            self._failure = error
            raise


def queued_on(device: torch.device) -> Any:
    """What marks the work that the current stream has been given so far; None on a CPU."""
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event


@contextmanager
def after(queued: Any, device: torch.device) -> Iterator[None]:
    """In a thread: return when what `queued_on` marked is done, and work on a stream of one's own from then on.

    The host waits, not just the stream: values in pinned memory are read by the CPU, which knows of no stream.
    """
    if queued is None:
        yield
        return
    queued.synchronize()
    with torch.Stream(device):
        yield
