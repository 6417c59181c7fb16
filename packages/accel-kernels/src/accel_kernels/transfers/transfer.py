"""``Transfer``: bytes on their way, what they must not lose, and what became of them.

In: a driver's handle and what was asked of it. Out: nothing, or an error that names the file.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .drivers import Handle
from .failures import explain
from .files import StripedFile, TransferFile
from .memory import Span

if TYPE_CHECKING:
    from .engine import TransferEngine

log = logging.getLogger(__name__)


class Ask:
    """What a transfer was asked for, and must not lose."""

    def __init__(self, file: TransferFile | StripedFile, offset: int, span: Span, writes: bool) -> None:
        self.file = file
        self.offset = offset
        self.nbytes = span.nbytes
        self.owner = span.owner
        self.writes = writes

    def error(self, handle: Handle) -> TransferError | None:
        """What went wrong, once it is done."""
        failure = handle.failure()
        if failure is None:
            return None
        code, piece, at = failure
        file = self.file.locate(self.offset, self.nbytes, piece)
        verb = "writing" if self.writes else "reading"
        doing = f"{verb} {self.nbytes} bytes at offset {self.offset}: {handle.bytes_done()} done, byte {at}"
        if code == 0 and not file.closed:
            doing += f" of {file.nbytes}"
        return explain(file.path, code, doing)


# Transfers that nobody holds any more; whoever calls their engine next lets go of those that are done.
Abandoned = deque[tuple[Handle, Ask]]


class Transfer:
    """Bytes on their way; made by ``TransferEngine.read`` and ``write``.

    Whoever lets go of it without waiting loses nothing but the error, which is then logged: file and memory stay
    until it is done.
    """

    def __init__(self, engine: TransferEngine, handle: Handle, ask: Ask, abandoned: Abandoned) -> None:
        self._engine = engine
        self._pid = os.getpid()
        self._abandoned = abandoned
        self._handle = handle
        self._ask = ask
        self._seen = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._ask.nbytes

    @property
    def memory(self) -> Any:
        """What keeps its memory alive (a tensor's storage, or a buffer); None once somebody has waited for it."""
        return self._ask.owner

    def is_done(self) -> bool:
        """Whether it has ended, well or not; does not wait, does not raise."""
        return self._handle.is_done()

    def wait(self) -> None:
        """Return when it has ended; other Python threads run meanwhile.

        Raises:
            TransferError: not all bytes got through. Of a read, nothing that is in memory may be used then.
            BackendUnavailableError: in a forked child.
        """
        if os.getpid() != self._pid:
            self._engine.check_usable("wait")
        self._handle.wait()
        self._seen = True
        self._ask.owner = None  # the memory is the caller's alone again
        error = self._ask.error(self._handle)
        if error is not None:
            raise error

    def __del__(self) -> None:
        if not hasattr(self, "_seen") or self._seen:
            return
        if not self._handle.is_done():
            self._abandoned.append((self._handle, self._ask))
        else:
            log_failure(self._handle, self._ask)


def log_failure(handle: Handle, ask: Ask) -> None:
    """Tell the log what nobody else has been told; the transfer is done."""
    error = ask.error(handle)
    if error is not None:
        log.error("a transfer that nobody waited for has failed: %s", error)
