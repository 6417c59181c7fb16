"""Aligned memory for reads and writes past the page cache, in a pool of fixed size: the bound of host memory.

The pool is one region in huge pages where the system has them: a disk takes a few large segments in half the time that
it needs for a thousand pages.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

import numpy as np

HUGE_PAGE = 2 << 20


class BufferPool:
    """So many buffers of so many bytes; who asks for one waits until one is free.

    Args:
        count: buffers.
        nbytes: of each; rounded up to whole pages, at which they begin.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        page = HUGE_PAGE if nbytes >= HUGE_PAGE else mmap.PAGESIZE
        self.nbytes = -(-max(nbytes, 1) // page) * page
        spare = page if page == HUGE_PAGE else 0  # the system need not begin the region at a huge page
        region = mmap.mmap(-1, count * self.nbytes + spare)
        with suppress(AttributeError, OSError):  # not on every system
            region.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(region)
        first = -_address(whole) % page
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for number in range(count):
            start = first + number * self.nbytes
            self._free.put(whole[start : start + self.nbytes])

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


def _address(buffer: memoryview) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
