"""Aligned memory for reads and writes past the page cache, in a pool of fixed size: the bound of host memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue


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
            self._free.put(memoryview(mmap.mmap(-1, self.nbytes)))

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
