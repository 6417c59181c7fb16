"""``TransferEngine``: what can be asked for.

In: a file, an offset, memory. Out: a ``Transfer`` under way. A driver gets descriptors and addresses alone; what it
must not lose meanwhile, the transfer keeps.
"""

from __future__ import annotations

import logging
import operator
import os
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import AccelTypeError, AccelValueError, BackendUnavailableError
from .drivers import Driver, make
from .files import StripedFile, TransferFile, share_bytes
from .memory import Span, span_of
from .transfer import Abandoned, Ask, Transfer, log_failure

log = logging.getLogger(__name__)

MIB = 1 << 20


class TransferEngine:
    """Moves bytes between files and memory, many requests at a time, beside whatever the process computes.

    Requests start in the order in which they are made and end in any; of two that touch the same bytes at the
    same time, wait for the one before the other is made. Several threads may use one engine. It belongs to the
    process that made it: a forked child gets an error and makes its own.

    Args:
        engine: ``"io_uring"``; ``"threads"``, which read and write one block each; ``"portable"``, Python
            threads; None: the first of them that runs here.
        queue_depth: blocks that io_uring has under way.
        block_bytes: larger requests are cut into blocks of so many bytes.
        num_threads: threads of the other two.

    Attributes:
        name: the engine that runs.
        why: why it is that one; where it is not io_uring, what speaks against that.

    Raises:
        AccelValueError: a number out of range, or no such engine.
        BackendUnavailableError: the engine that was asked for cannot run here.
    """

    def __init__(
        self,
        *,
        engine: str | None = None,
        queue_depth: int = 32,
        block_bytes: int = MIB,
        num_threads: int = 4,
    ) -> None:
        _check_range("queue_depth", queue_depth, 1, 4096)
        _check_range("block_bytes", block_bytes, 4096, 1 << 30)
        _check_range("num_threads", num_threads, 1, 256)
        self.queue_depth, self.block_bytes, self.num_threads = queue_depth, block_bytes, num_threads
        self.name, self.why, self._driver = make(engine, queue_depth, block_bytes, num_threads)
        self._pid = os.getpid()
        self._files: weakref.WeakSet[TransferFile] = weakref.WeakSet()
        self._registered: dict[int, int] = {}
        # Transfers that nobody holds any more: they are kept until they are done.
        self._abandoned: Abandoned = deque()
        self._stop = weakref.finalize(self, _stop, self._driver, self._abandoned, self._pid)

    def open(
        self, path: str | os.PathLike[str], *, nbytes: int | None = None, write: bool = True
    ) -> TransferFile:
        """Open a file, past the page cache where its file system can (``file.direct``).

        Args:
            path: where it is.
            nbytes: make it, or make it longer, so that it holds so many bytes; the disk sets them aside now.
                None: it must be there.
            write: whether it will be written.

        Raises:
            TransferError: it cannot be opened, or the disk is too full.
            AccelValueError: ``nbytes`` without ``write``, or the engine is closed.
        """
        self.check_usable("open")
        if nbytes is not None and (nbytes < 0 or not write):
            raise AccelValueError(
                f"TransferEngine.open: nbytes: expected 0 or more, and write=True, got {nbytes}, write={write}"
            )
        file = TransferFile(self._driver, os.fspath(path), nbytes=nbytes, write=write)
        self._files.add(file)
        return file

    def open_striped(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        stripe_bytes: int = MIB,
        nbytes: int | None = None,
        write: bool = True,
    ) -> StripedFile:
        """Open several files, on as many disks, to be read and written as one.

        Args:
            paths: where they are; the order is part of what the bytes mean.
            stripe_bytes: so many go to one file before the next has its turn: a multiple of 4096.
            nbytes: of all of them together; see ``open``.
            write: see ``open``.

        Raises:
            TransferError, AccelValueError: as ``open``.
        """
        if not paths or len({os.path.realpath(path) for path in paths}) != len(paths):
            raise AccelValueError(f"open_striped: paths: expected different files, got {[*map(str, paths)]}")
        if stripe_bytes <= 0 or stripe_bytes % 4096:
            raise AccelValueError(
                f"open_striped: stripe_bytes: expected a multiple of 4096, got {stripe_bytes}"
            )
        share = None if nbytes is None else share_bytes(nbytes, len(paths), stripe_bytes)
        files: list[TransferFile] = []
        try:
            files.extend(self.open(path, nbytes=share, write=write) for path in paths)
        except BaseException:
            for file in files:
                file.close()
            raise
        return StripedFile(files, stripe_bytes)

    def read(self, file: TransferFile | StripedFile, offset: int, out: Any) -> Transfer:
        """Start reading bytes of a file into memory; until the transfer is done, leave both alone.

        Args:
            file: one of this engine.
            offset: where in the file, in bytes.
            out: a contiguous CPU tensor or a writable buffer; all of it is filled. Fastest where offset, size
                and address are multiples of 4096 (``aligned_empty``), right in any case.

        Returns:
            The transfer under way. It keeps the memory alive.

        Raises:
            AccelTypeError, AccelValueError: wrong memory, a file of another engine, or something is closed.
        """
        return self._start(file, offset, span_of("TransferEngine.read: out", out, written=True), writes=False)

    def write(self, file: TransferFile | StripedFile, offset: int, data: Any) -> Transfer:
        """Start writing memory into a file, which grows where it must; see ``read``.

        Done means that readers of the file get the new bytes; ``file.sync()`` makes them survive a power cut.
        """
        return self._start(
            file, offset, span_of("TransferEngine.write: data", data, written=False), writes=True
        )

    def close(self) -> None:
        """Wait for transfers under way, close the engine's files, end its threads; more calls do nothing."""
        if os.getpid() != self._pid:
            return
        for file in list(self._files):
            file.close()
        self._stop()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return not self._stop.alive

    @property
    def registered_bytes(self) -> int:
        """Memory that the kernel keeps at hand: see ``aligned_empty``."""
        return sum(self._registered.values())

    def adopt_buffer(self, owner: Any, address: int, nbytes: int) -> None:
        """Register memory for as long as ``owner`` lives; what the system refuses is logged."""
        self.check_usable("register")
        buffer_id = self._driver.add_buffer(address, nbytes)
        if buffer_id < 0:
            log.info("%d bytes are not registered with %s: %s", nbytes, self.name, os.strerror(-buffer_id))
            return
        self._registered[buffer_id] = nbytes
        forget = weakref.finalize(owner, _forget, self._driver, self._registered, buffer_id, self._pid)
        forget.atexit = False

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TransferEngine({self.name}{', closed' if self.closed else ''}: {self.why})"

    def _start(self, file: TransferFile | StripedFile, offset: int, span: Span, *, writes: bool) -> Transfer:
        doing = "write" if writes else "read"
        self.check_usable(doing)
        _sweep(self._abandoned)
        if not isinstance(file, (TransferFile, StripedFile)):
            raise AccelTypeError(
                f"TransferEngine.{doing}: file: expected a file of this engine's open, got {type(file).__name__}"
            )
        if not file.belongs_to(self._driver):
            raise AccelValueError(f"TransferEngine.{doing}: {file.path}: was opened by another engine")
        file.check_open()
        if writes and not file.writable:
            raise AccelValueError(f"TransferEngine.write: {file.path}: was opened with write=False")
        try:
            offset = operator.index(offset)
        except TypeError:
            raise AccelTypeError(
                f"TransferEngine.{doing}: {file.path}: offset: expected an integer, got {offset!r}"
            ) from None
        if not 0 <= offset <= (1 << 63) - 1 - span.nbytes:
            raise AccelValueError(
                f"TransferEngine.{doing}: {file.path}: offset: expected 0 or more, got {offset}"
            )
        try:
            handle = self._driver.submit(file.pieces(offset, span.address, span.nbytes), writes)
        except RuntimeError as error:  # another thread was quicker
            raise AccelValueError(f"TransferEngine.{doing}: {file.path}: {error}") from error
        return Transfer(self, handle, Ask(file, offset, span, writes), self._abandoned)

    def check_usable(self, doing: str) -> None:
        """Raise if it has been closed, or belongs to another process."""
        if os.getpid() != self._pid:
            raise BackendUnavailableError(
                f"TransferEngine.{doing}: the engine belongs to process {self._pid}, which forked this one "
                f"({os.getpid()}); make another engine here"
            )
        if self.closed:
            raise AccelValueError(f"TransferEngine.{doing}: the engine is closed")


def _sweep(abandoned: Abandoned) -> None:
    """Let go of what abandoned transfers held, once they are done."""
    # Without a lock, for `Transfer.__del__` adds to it at any moment, within this very function too.
    for _ in range(len(abandoned)):
        try:
            handle, ask = abandoned.popleft()
        except IndexError:
            return
        if handle.is_done():
            log_failure(handle, ask)
        else:
            abandoned.append((handle, ask))


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise AccelValueError(f"TransferEngine: {name}: expected {least} to {most}, got {value}")


def _stop(driver: Driver, abandoned: Abandoned, pid: int) -> None:
    if os.getpid() == pid:
        driver.close()
        _sweep(abandoned)


def _forget(driver: Driver, registered: dict[int, int], buffer_id: int, pid: int) -> None:
    if os.getpid() == pid:
        registered.pop(buffer_id, None)  # first: the id may be another buffer's at once
        driver.remove_buffer(buffer_id)
