"""PURE: who writes which part of which tensor, and which bytes of which file a reader needs.

In: for each rank, the boxes it holds (replicas allowed). Out: for each rank, the chunks it writes: every element of
every tensor once, in chunks of bounded size, with the bytes of replicas shared out evenly. And back: for boxes that a
rank wants, spans of chunks. Works on names and ints. Next: `writer` and `reader`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .boxes import Box, cut, disjoint_cover, flat_range, intersect, offset_of


@dataclass(frozen=True)
class Held:
    """What one rank holds of one tensor.

    Attributes:
        itemsize: bytes of an element.
    """

    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Assignment:
    """A chunk to be written: the part `box` of tensor `name`."""

    name: str
    box: Box
    nbytes: int


def plan_chunks(holdings: Sequence[Mapping[str, Held]], chunk_bytes: int) -> list[list[Assignment]]:
    """Deal out the parts of all tensors; the same on every rank, since nothing but the arguments decides.

    What one rank alone holds, it writes; what several hold goes, the largest chunk first, to the one with the least to
    write so far.

    Args:
        holdings: by rank.
        chunk_bytes: upper bound of a chunk (an element is never cut).

    Returns:
        by rank, in the order in which tensors were first named.

    Raises:
        ValueError: ranks disagree about a tensor's shape or dtype, or nobody holds some part of one; names it.
    """
    order = {name: at for at, name in enumerate(dict.fromkeys(name for held in holdings for name in held))}
    given: list[list[Assignment]] = [[] for _ in holdings]
    loads = [0] * len(holdings)
    shared: list[tuple[Assignment, list[int]]] = []
    for name in order:
        ranks = [rank for rank, held in enumerate(holdings) if name in held]
        first = holdings[ranks[0]][name]
        if any(
            holdings[r][name].shape != first.shape or holdings[r][name].dtype != first.dtype for r in ranks
        ):
            said = (f"rank {r}: {holdings[r][name].shape} {holdings[r][name].dtype}" for r in ranks)
            raise ValueError(f"{name!r}: ranks disagree about it: {', '.join(said)}")
        boxes = [box for rank in ranks for box in holdings[rank][name].boxes]
        holders = [rank for rank in ranks for _ in holdings[rank][name].boxes]
        try:
            parts = disjoint_cover(first.shape, boxes)
        except ValueError as error:
            raise ValueError(f"{name!r}, shape {first.shape}: {error}") from None
        for box, positions in parts:
            owners = sorted({holders[position] for position in positions})
            for piece in cut(box, chunk_bytes // first.itemsize):
                chunk = Assignment(name, piece, piece.numel * first.itemsize)
                if len(owners) > 1:
                    shared.append((chunk, owners))
                    continue
                given[owners[0]].append(chunk)
                loads[owners[0]] += chunk.nbytes
    for chunk, owners in sorted(shared, key=lambda item: -item[0].nbytes):
        rank = min(owners, key=loads.__getitem__)
        given[rank].append(chunk)
        loads[rank] += chunk.nbytes
    for chunks in given:
        chunks.sort(key=lambda chunk: (order[chunk.name], chunk.box))
    return given


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of a chunk, which hold its part `box`.

    Attributes:
        chunk: position of the chunk among its tensor's.
        box: what is wanted of it, in the tensor's coordinates.
        wanted: position of the wanted box.
    """

    chunk: int
    wanted: int
    box: Box
    start: int
    stop: int


def plan_spans(
    chunks: Sequence[Box], wanted: Sequence[Box], itemsize: int, most_bytes: int
) -> Iterator[Span]:
    """The parts of chunks that hold the wanted boxes, in spans of at most `most_bytes` where that can be.

    Where a part is not contiguous in its chunk (columns of rows), the span covers what lies between, too.
    """
    for at, chunk in enumerate(chunks):
        for number, box in enumerate(wanted):
            part = intersect(chunk, box)
            if part is None:
                continue
            if part == chunk and part.numel * itemsize <= most_bytes:
                yield Span(at, number, part, 0, part.numel * itemsize)
                continue
            inside = Box(tuple(a - c for a, c in zip(part.start, chunk.start, strict=True)), part.sizes)
            contiguous = flat_range(chunk.sizes, inside) is not None
            for piece in cut(inside, most_bytes // itemsize) if contiguous else [inside]:
                start = offset_of(chunk.sizes, piece.start) * itemsize
                stop = (offset_of(chunk.sizes, [b - 1 for b in piece.stop]) + 1) * itemsize
                absolute = Box(
                    tuple(a + c for a, c in zip(piece.start, chunk.start, strict=True)), piece.sizes
                )
                yield Span(at, number, absolute, start, stop)


@dataclass
class Extent:
    """Neighbouring spans of one file, to be read at once: bytes `start` to `stop`, whole pages.

    Attributes:
        members: positions of the spans it serves.
    """

    file: int
    start: int
    stop: int
    members: list[int]


def plan_extents(
    spans: Sequence[tuple[int, int, int]], page_bytes: int, most_bytes: int, file_bytes: Sequence[int]
) -> list[Extent]:
    """Join spans into reads.

    Args:
        spans: (file, start, stop) of each.
        page_bytes: reads begin and end at multiples of it, or at the end of the data.
        most_bytes: a read grows no further than this; a single span may be longer.
        file_bytes: bytes of data of each file.

    Returns:
        extents in the order of files and bytes; no page is in two of them unless one ended there for its size.
    """
    extents: list[Extent] = []
    for position in sorted(range(len(spans)), key=spans.__getitem__):
        file, start, stop = spans[position]
        low = start // page_bytes * page_bytes
        high = min(-(-stop // page_bytes) * page_bytes, file_bytes[file])
        now = extents[-1] if extents else None
        joins = now is not None and now.file == file and low <= now.stop
        if (
            joins
            and now is not None
            and max(high, now.stop) - now.start <= max(most_bytes, now.stop - now.start)
        ):
            now.stop = max(now.stop, high)
            now.members.append(position)
        else:
            extents.append(Extent(file, low, high, [position]))
    return extents
