"""Aligned memory for reads and writes past the page cache, in a pool of fixed size: the bound of host memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

HUGE_BYTES = 2 << 20
"""A huge page: a request of some MiB that lies in a few of them reaches the disk whole, not page by page."""


class BufferPool:
    """So many buffers of so many bytes; who asks for one waits until one is free.

    Args:
        count: buffers.
        nbytes: of each; rounded up to whole memory pages, at which they begin.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self.nbytes = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(count):
            self._free.put(aligned_memory(self.nbytes))

    def take(self) -> memoryview:
        """A buffer, to be given back with `give`."""
        return self._free.get()

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back."""
        self._free.put(buffer)

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """A buffer for the length of a block."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give(buffer)


def aligned_memory(nbytes: int) -> memoryview:
    """Memory that begins at a page; large ones at a huge page, and of huge pages where the system has them."""
    if nbytes < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, nbytes))
    whole = mmap.mmap(-1, nbytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        whole.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(whole)) % HUGE_BYTES
    return memoryview(whole)[start : start + nbytes]
