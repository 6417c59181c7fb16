"""One rank's data file: chunks in, blocks of the file out, each filled, summed and written by a thread of its own.

In: tensors' parts, as they lie in memory. Out: a durable file and its records. Large chunks lie in the file as in
memory, as far as the disk can tell, and are written from where they are; small ones and the ends of large ones pass
through the pool's buffers. Of tensors on a device, compressed or not contiguous, the chunks on their way are held, too.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from . import codecs
from .buffers import BufferPool
from .codecs import Compression
from .index import FileRecord
from .pages import PAGE_BYTES, Checksums, checksum, footer_of, num_pages, page_checksums
from .stores import Directory, Sink
from .vectors import address_of, lay_out

BLOCK_BYTES = 4 << 20
CHUNK_ALIGN = 64
"""Chunks begin at multiples of it, so that any dtype may be read where it lies."""
NUM_BUFFERS = 8
IN_PLACE_BYTES = 1 << 20
"""Chunks from this size on are written from their own memory; for it, up to a page is skipped in the file."""


@dataclass(frozen=True)
class Piece:
    """A chunk to be written: values of some tensor, on any device and of any strides."""

    name: str
    values: torch.Tensor


@dataclass(frozen=True)
class Written:
    """A file that is on the disk.

    Attributes:
        places: for each piece, in order: its offset, its bytes there, its codec.
    """

    file: FileRecord
    places: list[tuple[int, int, int]]


def write_file(
    directory: Directory,
    name: str,
    pieces: Iterable[Piece],
    sizes: Sequence[int],
    *,
    compression: Compression,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Write pieces into a new file; returns when it is durable.

    Args:
        directory: where.
        name: of the file.
        pieces: in the order in which they are to lie; taken one after another, as there is room.
        sizes: bytes of each.
        compression: of each chunk.
        progress: told of bytes written, now and then.

    Raises:
        CheckpointError: the system refuses; nothing is left of the file.
    """
    known = None
    if compression.level is None:
        known = sum(map(_aligned, sizes))
        known += 8 * num_pages(known, PAGE_BYTES)
    sink = directory.sink(name, known)
    try:
        blocks = _Blocks(sink, progress)
        with ThreadPoolExecutor(max(2, sink.num_writers), thread_name_prefix="ckpt") as threads:
            blocks.threads = threads
            places = []
            for codec, data in _encoded(pieces, compression, threads):
                places.append((blocks.add(data), len(data), codec))
            checksums = blocks.finish()
        footer = footer_of(checksums)
        data_bytes = blocks.position
        blocks.write_footer(footer)
        sink.finish(data_bytes + len(footer))
    except BaseException:
        sink.abandon()
        raise
    return Written(FileRecord(name, data_bytes, checksum(footer)), places)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // CHUNK_ALIGN) * CHUNK_ALIGN


def _encoded(
    pieces: Iterable[Piece], compression: Compression, threads: ThreadPoolExecutor
) -> Iterator[tuple[int, bytes | memoryview]]:
    """Each piece's codec and bytes, in order; some are compressed ahead."""
    level = compression.level
    if level is None:
        for piece in pieces:
            yield codecs.RAW, bytes_of(piece.values)
        return

    def encode(values: torch.Tensor) -> tuple[int, bytes | memoryview]:
        return codecs.encode(bytes_of(values), values.element_size(), level)

    ahead: deque[Future[tuple[int, bytes | memoryview]]] = deque()
    for piece in pieces:
        ahead.append(threads.submit(encode, piece.values))
        if len(ahead) > NUM_BUFFERS:
            yield ahead.popleft().result()
    for job in ahead:
        yield job.result()


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; its own memory where it lies so on the CPU."""
    flat = values.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data if flat.numel() else memoryview(b"")


@dataclass
class _Blocks:
    """Cuts a stream of bytes into blocks and has them written; the one who adds waits when all buffers are taken.

    Attributes:
        position: where the next chunk begins.
    """

    sink: Sink
    progress: Callable[[int], None] | None
    position: int = 0
    threads: ThreadPoolExecutor = field(init=False)
    _pool: BufferPool = field(default_factory=lambda: BufferPool(NUM_BUFFERS, BLOCK_BYTES))
    _parts: list[tuple[int, memoryview]] = field(default_factory=list)
    _jobs: deque[Future[None]] = field(default_factory=deque)
    _sums: dict[int, list[int]] = field(default_factory=dict)
    _tail: tuple[int, bytes] = (0, b"")

    def add(self, data: memoryview | bytes) -> int:
        """Append, and go to the next multiple of `CHUNK_ALIGN`; where the chunk begins."""
        view = memoryview(data)
        if len(view) >= IN_PLACE_BYTES:
            shift = (address_of(view) - self.position) % self.sink.align
            self._move(self.position + shift * (shift % CHUNK_ALIGN == 0))
        begin = self.position
        while view:
            room = BLOCK_BYTES - self.position % BLOCK_BYTES
            self._parts.append((self.position % BLOCK_BYTES, view[:room]))
            self._move(self.position + min(room, len(view)))
            view = view[room:]
        self._move(_aligned(self.position))
        return begin

    def _move(self, position: int) -> None:
        """What lies between is zero; a block that is passed is sent."""
        block = self.position // BLOCK_BYTES
        self.position = position
        if position // BLOCK_BYTES > block:
            self._send(block * BLOCK_BYTES, BLOCK_BYTES)

    def finish(self) -> Checksums:
        """Write what is left; the checksums of all pages."""
        start = self.position // BLOCK_BYTES * BLOCK_BYTES
        self._tail = (start, b"")
        if self.position > start:
            self._send(start, self.position - start, last=True)
        while self._jobs:
            self._jobs.popleft().result()
        return np.array([each for at in sorted(self._sums) for each in self._sums[at]], dtype=np.uint64)

    def write_footer(self, footer: bytes) -> None:
        """Append the footer, together with the unfinished block before it."""
        start, head = self._tail
        data = head + footer
        padded = data + bytes(-len(data) % self.sink.align)
        buffer = mmap.mmap(-1, max(len(padded), 1))
        view = memoryview(buffer)
        view[: len(padded)] = padded
        self.sink.write_at(start, [view[: len(padded)]])

    def _send(self, start: int, nbytes: int, *, last: bool = False) -> None:
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        buffer, parts = self._pool.take(), self._parts
        self._parts = []
        if last or self.sink.num_writers == 1:
            self._write(start, nbytes, buffer, parts, last)
        else:
            self._jobs.append(self.threads.submit(self._write, start, nbytes, buffer, parts, last))

    def _write(
        self,
        start: int,
        nbytes: int,
        buffer: memoryview,
        parts: list[tuple[int, memoryview]],
        last: bool,
    ) -> None:
        try:
            block, vector = np.frombuffer(buffer, np.uint8), lay_out(buffer, nbytes, parts, self.sink.align)
            end = 0
            for at, data in parts:
                block[end:at] = 0
                end = at + len(data)
            block[end:nbytes] = 0
            for at, data in vector.bounced:
                np.copyto(block[at : at + len(data)], np.frombuffer(data, np.uint8))
            self._sums[start] = page_checksums(vector.views, PAGE_BYTES)
            if last:
                self._tail = (start, b"".join(vector.views))
            else:
                self.sink.write_at(start, vector.views)
            if self.progress is not None:
                self.progress(nbytes)
        finally:
            self._pool.give(buffer)
