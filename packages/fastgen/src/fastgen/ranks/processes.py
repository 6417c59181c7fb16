"""Child processes that end with their parent, and are steered by it alone.

A child is spawned with SIGINT and SIGTERM blocked: Ctrl-C in a terminal reaches the parent, which ends its children in
order. A child whose parent is gone ends at once, whatever it does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NoReturn

END_TIMEOUT_S = 10.0  # for a child to end when it is asked to; then it is killed


def start(work: Callable[..., None], *arguments: object, name: str) -> tuple[BaseProcess, Connection]:
    """Start `work(*arguments, connection)` in a process; gives it, and the other end of the connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    level = logging.getLogger().getEffectiveLevel()
    process = context.Process(target=_child, args=(work, level, *arguments, theirs), name=name)
    with theirs, _signals_blocked():
        process.start()
    return process, ours


def _child(work: Callable[..., None], level: int, *arguments: object) -> None:
    """Log as the parent does, with the process's name."""
    logging.basicConfig(level=level, format="%(asctime)s %(processName)s %(name)s: %(message)s")
    work(*arguments)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Children inherit the mask; what comes meanwhile for this process comes afterwards."""
    resource_tracker.ensure_running()  # else it is started on the way, and unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="fastgen-parent", daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process now: not after a collective with a rank that has ended, which may never end itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end(process: BaseProcess) -> None:
    """Wait for a process that was asked to end; kill it if it does not."""
    process.join(END_TIMEOUT_S)
    if process.exitcode is None:
        process.kill()
        process.join()


def how_it_ended(process: BaseProcess) -> str:
    """For people; of a process that has ended."""
    process.join()
    code = process.exitcode or 0
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"status {code}"
