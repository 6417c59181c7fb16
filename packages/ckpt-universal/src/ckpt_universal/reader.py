"""Chunks of a step -> straight into the tensors that want them; every page that is read is checked.

In: an index, and for each wanted tensor the boxes that this rank has room for. On the way: `plan.plan_spans` says which
bytes of which chunks, `plan.plan_extents` joins them into reads of whole pages. Out: values in place, cast to the
tensors' dtype. Several threads read, check and copy; the pool of buffers bounds what is held.

Note [Reads through huge pages]
Where the disk could write into tensors themselves, it would: but their memory is of small pages, of which a request
takes some hundreds, and reading into it took half as long again as reading into huge pages and copying from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import codecs
from .boxes import Box
from .buffers import BufferPool
from .errors import CorruptError
from .index import ChunkRecord, Index, TensorRecord
from .pages import Checksums, checksum, checksums_of, first_bad_page, num_pages
from .plan import Extent, plan_extents, plan_spans
from .stores import ALIGN, Directory, Source
from .values import DTYPES

READ_BYTES = 4 << 20
NUM_READERS = 4


@dataclass(frozen=True)
class Want:
    """Where values of a tensor of the index are to go.

    Attributes:
        name: the tensor's name in the index.
        pieces: boxes of it, each with a view of that shape, on any device, of any strides and dtype.
    """

    name: str
    pieces: Sequence[tuple[Box, torch.Tensor]]


@dataclass(frozen=True)
class _Copy:
    """One span of a chunk, and the place of its values."""

    name: str
    tensor: TensorRecord
    chunk: ChunkRecord
    box: Box
    start: int
    stop: int
    into: torch.Tensor


@dataclass
class ReadReport:
    """What a load has read: bytes of data files, and bytes that were wanted."""

    read_bytes: int = 0
    wanted_bytes: int = 0


def read_into(
    directory: Directory, index: Index, wants: Sequence[Want], progress: Callable[[int], None] | None = None
) -> ReadReport:
    """Fill what is wanted.

    Raises:
        CorruptError: a file is missing or shorter than it should be, or a page is not what was written; names file,
            page and tensors. What was wanted holds old and new values then.
    """
    copies = [copy for want in wants for copy in _copies(index, want)]
    report = ReadReport(wanted_bytes=sum(copy.box.numel * copy.tensor.itemsize for copy in copies))
    spans = [_in_file(copy) for copy in copies]
    sizes = [file.data_bytes for file in index.files]
    extents = plan_extents(spans, index.page_bytes, READ_BYTES, sizes)
    with ExitStack() as stack:
        files = {}
        for number in sorted({extent.file for extent in extents}):
            files[number] = _open(directory, index, number, stack)
        largest = max((extent.stop - extent.start for extent in extents), default=1)
        pool = BufferPool(NUM_READERS, -(-largest // ALIGN) * ALIGN)

        def serve(extent: Extent) -> int:
            source, sums = files[extent.file]
            nbytes = extent.stop - extent.start
            with pool.lent() as buffer, torch.no_grad():
                source.read_into(extent.start, buffer[: -(-nbytes // source.align) * source.align], nbytes)
                _check(index, extent, buffer[:nbytes], sums, copies, directory)
                for position in extent.members:
                    _place(copies[position], extent, buffer, directory)
            if progress is not None:
                progress(nbytes)
            return nbytes

        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="ckpt") as threads:
            report.read_bytes = sum(threads.map(serve, extents))
    return report


def _copies(index: Index, want: Want) -> list[_Copy]:
    tensor = index.tensors[want.name]
    found = []
    boxes = [box for box, _ in want.pieces]
    for span in plan_spans([c.box for c in tensor.chunks], boxes, tensor.itemsize, READ_BYTES):
        box, view = want.pieces[span.wanted]
        into = view
        if span.box != box:
            ranges = zip(box.start, span.box.start, span.box.sizes, strict=True)
            into = view[tuple(slice(b - a, b - a + n) for a, b, n in ranges)]
        chunk = tensor.chunks[span.chunk]
        found.append(_Copy(want.name, tensor, chunk, span.box, span.start, span.stop, into))
    covered, needed = sum(copy.box.numel for copy in found), sum(box.numel for box in boxes)
    if covered != needed:
        raise CorruptError(
            f"{want.name!r}: the index has chunks for {covered} of the {needed} elements wanted"
        )
    return found


def _memory(copy: _Copy) -> npt.NDArray[np.uint8] | None:
    """The memory that a copy fills, if it is to hold what the file holds, byte by byte."""
    into, chunk = copy.into, copy.chunk
    same = chunk.codec == codecs.RAW and into.dtype == DTYPES[copy.tensor.dtype]
    whole = copy.stop - copy.start == copy.box.numel * copy.tensor.itemsize
    if (
        not (same and whole and into.device.type == "cpu" and into.is_contiguous())
        or into.is_conj()
        or into.is_neg()
    ):
        return None
    data: npt.NDArray[np.uint8] = into.detach().reshape(-1).view(torch.uint8).numpy()
    return data


def _in_file(copy: _Copy) -> tuple[int, int, int]:
    """What of the file must be read for it: of a compressed chunk, all."""
    chunk = copy.chunk
    if chunk.codec != codecs.RAW:
        return chunk.file, chunk.offset, chunk.offset + chunk.nbytes
    return chunk.file, chunk.offset + copy.start, chunk.offset + copy.stop


def check_sizes(directory: Directory, index: Index) -> None:
    """All data files are as long as the index says: then room for its tensors may be made, for it bounds them by that.

    Raises:
        CorruptError: a file is missing, or of another length.
    """
    for number in range(len(index.files)):
        _check_size(directory, index, number)


def _check_size(directory: Directory, index: Index, number: int) -> None:
    record = index.files[number]
    where = f"{directory.path}/{record.name}"
    try:
        size = directory.size(record.name)
    except FileNotFoundError:
        raise CorruptError(f"{where}: missing; {_holds(index, number)}") from None
    expected = record.num_bytes(index.page_bytes)
    if size != expected:
        raise CorruptError(f"{where}: {size} bytes long, expected {expected}; {_holds(index, number)}")


def _open(directory: Directory, index: Index, number: int, stack: ExitStack) -> tuple[Source, Checksums]:
    _check_size(directory, index, number)
    name = index.files[number].name
    where = f"{directory.path}/{name}"
    try:
        source = directory.source(name)
    except FileNotFoundError:
        raise CorruptError(f"{where}: missing; {_holds(index, number)}") from None
    stack.callback(source.close)
    return source, read_checksums(source, index, number, where)


def read_checksums(source: Source, index: Index, number: int, where: str) -> Checksums:
    """The footer of a file, checked."""
    record = index.files[number]
    length = 8 * num_pages(record.data_bytes, index.page_bytes)
    low = record.data_bytes // ALIGN * ALIGN
    need = record.data_bytes + length - low
    pool = BufferPool(1, need + ALIGN)
    with pool.lent() as buffer:
        source.read_into(low, buffer[: -(-need // ALIGN) * ALIGN], need)
        footer = bytes(buffer[record.data_bytes - low : need])
    if checksum(footer) != record.footer:
        raise CorruptError(f"{where}: its checksums are damaged; {_holds(index, number)}")
    return checksums_of(footer)


def _holds(index: Index, number: int) -> str:
    names = [name for name, t in index.tensors.items() if any(c.file == number for c in t.chunks)]
    return f"it holds parts of {', '.join(map(repr, names[:4]))}" + (
        f" and {len(names) - 4} more" if len(names) > 4 else ""
    )


def _check(
    index: Index,
    extent: Extent,
    data: memoryview,
    sums: Checksums,
    copies: Sequence[_Copy],
    directory: Directory,
) -> None:
    bad = first_bad_page([data], extent.start // index.page_bytes, sums, index.page_bytes)
    if bad is None:
        return
    low, high = bad * index.page_bytes, (bad + 1) * index.page_bytes
    names = dict.fromkeys(
        copies[position].name
        for position in extent.members
        if _in_file(copies[position])[1] < high and low < _in_file(copies[position])[2]
    )
    raise CorruptError(
        f"{directory.path}/{index.files[extent.file].name}: bytes {low} to {high} are not what was written; they hold "
        f"parts of {', '.join(map(repr, names))}"
    )


def _place(copy: _Copy, extent: Extent, buffer: memoryview, directory: Directory) -> None:
    """Values from the buffer into the tensor."""
    tensor, chunk = copy.tensor, copy.chunk
    at = chunk.offset - extent.start
    if chunk.codec == codecs.RAW:
        data = buffer[at + copy.start : at + copy.stop]
        memory = _memory(copy)
        if memory is not None:
            np.copyto(memory, np.frombuffer(data, np.uint8))
            copy.into.reshape(-1)[:0].zero_()  # its version has changed, for those who look at that
            return
    else:
        where = f"{directory.path}: {copy.name!r}"
        raw = chunk.box.numel * tensor.itemsize
        data = codecs.decode(buffer[at : at + chunk.nbytes], chunk.codec, raw, tensor.itemsize, where)
        data = data[copy.start : copy.stop]
    if data.readonly:
        data = memoryview(bytearray(data))
    strides = [math.prod(chunk.box.sizes[dim + 1 :]) for dim in range(len(chunk.box.sizes))]
    values = torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).as_strided(copy.box.sizes, strides)
    copy.into.copy_(values)
