"""The driver where the extension was not built: ``preadv`` and ``pwritev`` in Python threads.

In: pieces, as every driver gets them. They are cut at block and page boundaries; what is aligned in file and
memory goes past the page cache, the rest through it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .drivers import Piece

log = logging.getLogger(__name__)

# (number of the piece, descriptor, offset, address, bytes)
Op = tuple[int, int, int, int, int]


@dataclass
class PortableFile:
    """Descriptors of a file and what ``O_DIRECT`` asks of offsets and addresses."""

    direct: int
    buffered: int
    align: int
    memory_align: int
    # Guarded by the driver's condition.
    num_running: int = 0
    detached: bool = False

    def descriptor(self, offset: int, address: int, nbytes: int) -> int:
        """The one that can move these bytes."""
        aligned = offset % self.align == 0 and nbytes % self.align == 0 and address % self.memory_align == 0
        return self.direct if aligned and self.direct >= 0 else self.buffered


def cut(pieces: Sequence[Piece], block_bytes: int) -> Iterator[Op]:
    """The system calls of a request: whole blocks, and what lies before and behind page boundaries."""
    for number, (file, offset, address, nbytes) in enumerate(pieces):
        end = offset + nbytes
        at = offset
        while at < end:
            past = at % file.align
            whole = (end - at) // file.align * file.align
            step = min(end - at, file.align - past) if past or not whole else min(whole, block_bytes)
            here = address + at - offset
            yield number, file.descriptor(at, here, step), at, here, step
            at += step


@dataclass
class PortableHandle:
    """A request; runners take its ops until there are none."""

    pieces: Sequence[Piece]
    writes: bool
    ops: Iterator[Op]
    runners: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: threading.Event = field(default_factory=threading.Event)
    failed: tuple[int, int, int] | None = None
    num_done: int = 0

    def wait(self) -> None:
        """See ``Handle``."""
        self.done.wait()

    def is_done(self) -> bool:
        """See ``Handle``."""
        return self.done.is_set()

    def failure(self) -> tuple[int, int, int] | None:
        """See ``Handle``."""
        return self.failed

    def bytes_done(self) -> int:
        """See ``Handle``."""
        return self.num_done

    def run(self) -> bool:
        """Take ops until there are none; whether this was the last runner."""
        while True:
            with self.lock:
                op = None if self.failed else next(self.ops, None)
                if op is None:
                    self.runners -= 1
                    return self.runners == 0
            try:
                self._move(*op)
            except Exception:
                log.exception("a transfer's thread has failed")
                number, _, offset, *_ = op
                with self.lock:
                    self.failed = self.failed or (errno.EIO, number, offset)

    def _move(self, number: int, descriptor: int, offset: int, address: int, nbytes: int) -> None:
        view = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
        file = self.pieces[number][0]
        moved, code = 0, 0
        while moved < nbytes and not code:
            if moved and (offset + moved) % file.align:
                descriptor = file.buffered  # stopped inside a block, as at the end of a file
            try:
                if self.writes:
                    step = os.pwritev(descriptor, [view[moved:]], offset + moved)
                else:
                    step = os.preadv(descriptor, [view[moved:]], offset + moved)
            except OSError as error:
                if error.errno == errno.EINVAL and descriptor != file.buffered:
                    descriptor = file.buffered
                    continue
                code, step = error.errno or errno.EIO, 0
            else:
                if step == 0:
                    code = errno.EIO if self.writes else -1
            moved += step
        with self.lock:
            self.num_done += moved
            if code and self.failed is None:
                self.failed = (max(code, 0), number, offset + moved)


class PortableDriver:
    """Python threads; see ``Driver``.

    Raises:
        RuntimeError: the system starts no more threads.
    """

    def __init__(self, *, block_bytes: int, num_threads: int) -> None:
        self._block_bytes = block_bytes
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._closed = False
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="transfers")
        # All threads now: one that cannot be started later would leave a request half begun.
        all_here = threading.Barrier(num_threads)
        try:
            for _ in range(num_threads):
                self._pool.submit(all_here.wait)
        except RuntimeError:
            all_here.abort()
            self._pool.shutdown(wait=True)
            raise

    def attach(self, direct: int, buffered: int, align: int, memory_align: int) -> PortableFile:
        """See ``Driver``."""
        return PortableFile(direct, buffered, align, memory_align)

    def detach(self, file: PortableFile) -> None:
        """See ``Driver``."""
        with self._changed:
            file.detached = True
            self._changed.wait_for(lambda: file.num_running == 0)

    def submit(self, pieces: Sequence[Piece], writes: bool) -> PortableHandle:
        """See ``Driver``."""
        block = self._block_bytes // 4096 * 4096
        num_blocks = sum(nbytes // block + 3 for *_, nbytes in pieces)
        runners = min(self._num_threads, num_blocks)
        handle = PortableHandle(pieces, writes, cut(pieces, block), runners)
        if not pieces:
            handle.done.set()
            return handle
        with self._changed:
            if self._closed or any(file.detached for file, *_ in pieces):
                raise RuntimeError("is closed")
            for file, *_ in pieces:
                file.num_running += 1
            for _ in range(runners):
                self._pool.submit(self._run, handle)
        return handle

    def _run(self, handle: PortableHandle) -> None:
        if handle.run():
            with self._changed:
                for file, *_ in handle.pieces:
                    file.num_running -= 1
                self._changed.notify_all()
            handle.done.set()

    def add_buffer(self, address: int, nbytes: int) -> int:
        """See ``Driver``."""
        return -errno.EOPNOTSUPP

    def remove_buffer(self, buffer_id: int) -> None:
        """See ``Driver``."""

    def close(self) -> None:
        """See ``Driver``."""
        with self._changed:
            self._closed = True
        self._pool.shutdown(wait=True)
