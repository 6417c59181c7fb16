"""PURE: parts of a logical tensor, as boxes: one start and one size for each dim.

In: shapes, and what ranks hold. Out: boxes that cover a tensor once, cut to bounded sizes, and their intersections.
Works on ints; no tensor, no file. Next: `plan` decides who writes which box.

Note [Flat parts]
A shard may be a range of the flattened (row-major) tensor, as ZeRO's are. Such a range is a few boxes: the rest of the
first row, whole rows, the beginning of the last. Each of them is contiguous in the range, and they follow each other
there, so boxes serve for flat parts, for rows, columns and blocks alike.

Note [Random measure]
Do boxes cover a tensor once? Give each dim's cells, between all edges, widths drawn at random, and compare the boxes'
volumes with the tensor's. Volumes add up whatever the widths are if each cell is in one box; else the difference is a
polynomial in them that is not zero, of degree `dims`, and vanishes for at most dims / 2^64 of all draws (Schwartz,
Fast probabilistic algorithms for verification of polynomial identities, 1980). One pass, for boxes of any arrangement.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Elements `start[d] <= index[d] < start[d] + sizes[d]` of a tensor; a scalar's box has no dims."""

    start: Dims
    sizes: Dims

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)

    @property
    def stop(self) -> Dims:
        """First index behind it, for each dim."""
        return tuple(a + n for a, n in zip(self.start, self.sizes, strict=True))

    def within(self, shape: Sequence[int]) -> bool:
        """Whether it lies in a tensor of this shape."""
        if not len(self.start) == len(self.sizes) == len(shape):
            return False
        for a, n, whole in zip(self.start, self.sizes, shape, strict=True):  # all() takes three times as long
            if a < 0 or n < 0 or a + n > whole:
                return False
        return True


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes of one tensor share; None if that is nothing."""
    if one == other:
        return one if one.numel else None
    start = tuple(map(max, one.start, other.start))
    stop = tuple(map(min, one.stop, other.stop))
    if any(b <= a for a, b in zip(start, stop, strict=True)):
        return None
    return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))


def flat_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes of elements `start` to `stop` of the flattened tensor, in order; see Note [Flat parts].

    Returns:
        at most 2 * dims - 1 boxes, or a scalar's.
    """
    if stop <= start:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last and stop - start < row:
        inner = flat_boxes(shape[1:], start - first * row, stop - first * row)
        return [Box((first, *box.start), (1, *box.sizes)) for box in inner]
    boxes: list[Box] = []
    if start > first * row:
        boxes += flat_boxes(shape, start, (first + 1) * row)
        first += 1
    rest = last if stop < (last + 1) * row else last + 1
    if rest > first:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (rest - first, *shape[1:])))
    if rest == last:
        boxes += flat_boxes(shape, last * row, stop)
    return boxes


def flat_range(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """The range of the flattened tensor that a box is, or None where it is not contiguous there."""
    if not box.numel:
        return (0, 0)
    partial = False
    for size, whole in zip(reversed(box.sizes), reversed(shape), strict=True):
        if partial and size != 1:
            return None
        partial = partial or size != whole
    start = offset_of(shape, box.start)
    return start, start + box.numel


def offset_of(shape: Sequence[int], index: Sequence[int]) -> int:
    """Position of an element in the flattened tensor."""
    position = 0
    for size, at in zip(shape, index, strict=True):
        position = position * size + at
    return position


def cut(box: Box, most: int) -> Iterator[Box]:
    """Parts of at most `most` elements (at least one), in row-major order, each contiguous in the box."""
    if box.numel <= max(1, most) or not box.sizes:
        yield box
        return
    row = math.prod(box.sizes[1:])
    if row > most:
        for at in range(box.sizes[0]):
            inner = Box(box.start[1:], box.sizes[1:])
            for part in cut(inner, most):
                yield Box((box.start[0] + at, *part.start), (1, *part.sizes))
        return
    rows = max(1, most // row)
    for at in range(0, box.sizes[0], rows):
        taken = min(rows, box.sizes[0] - at)
        yield Box((box.start[0] + at, *box.start[1:]), (taken, *box.sizes[1:]))


def covers_once(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether each element of a tensor is in exactly one of the boxes, which lie within it.

    In time proportional to their number; wrongly true with a probability of dims / 2^64, see Note [Random measure].
    """
    if sum(box.numel for box in boxes) != math.prod(shape):
        return False
    if len(boxes) <= 1:
        return True
    draw = random.SystemRandom().getrandbits  # nobody may foresee it
    places = []
    for dim, size in enumerate(shape):
        edges = {0, size}
        for box in boxes:
            edges.add(box.start[dim])
            edges.add(box.start[dim] + box.sizes[dim])
        place, at = {}, 0
        for edge in sorted(edges):
            place[edge] = at
            at += 1 + draw(64)
        places.append(place)
    total = 0
    for box in boxes:
        volume = 1
        for place, start, size in zip(places, box.start, box.sizes, strict=True):
            volume *= place[start + size] - place[start]
        total += volume
    return total == math.prod(place[size] - place[0] for place, size in zip(places, shape, strict=True))


def disjoint_cover(shape: Sequence[int], boxes: Sequence[Box]) -> list[tuple[Box, list[int]]]:
    """Parts that cover the tensor once, each with the positions in `boxes` of those that contain it.

    Equal boxes are replicas. Where boxes overlap otherwise they are cut along each other's edges.

    Raises:
        ValueError: some element is in none of them.
    """
    holders: dict[Box, list[int]] = {}
    for position, box in enumerate(boxes):
        if box.numel:
            holders.setdefault(box, []).append(position)
    numel = math.prod(shape)
    flat = [(flat_range(shape, box), box) for box in holders]
    if all(spans is not None for spans, _ in flat):
        parts = _cover_flat(shape, [(spans, holders[box]) for spans, box in flat if spans is not None])
    else:
        parts = _cover_grid(list(holders), holders)
    covered = sum(box.numel for box, _ in parts)
    if covered != numel:
        raise ValueError(f"{numel - covered} of {numel} elements are held by nobody")
    return parts


def _cover_flat(
    shape: Sequence[int], spans: Sequence[tuple[tuple[int, int], list[int]]]
) -> list[tuple[Box, list[int]]]:
    """Intervals: cut at every edge, in one sweep."""
    edges = sorted({edge for span, _ in spans for edge in span})
    at = {edge: position for position, edge in enumerate(edges)}
    within: list[list[int]] = [[] for _ in edges]
    for (start, stop), positions in spans:
        for cell in range(at[start], at[stop]):
            within[cell] += positions
    return [
        (box, sorted(holders))
        for holders, start, stop in zip(within, edges, edges[1:], strict=False)
        if holders
        for box in flat_boxes(shape, start, stop)
    ]


def _cover_grid(boxes: Sequence[Box], holders: dict[Box, list[int]]) -> list[tuple[Box, list[int]]]:
    """Cut one dim after another at the edges of those that overlap there."""

    def split(dim: int, inside: Sequence[Box], start: Dims, sizes: Dims) -> Iterator[tuple[Box, list[int]]]:
        if dim == len(inside[0].sizes):
            yield Box(start, sizes), sorted(p for box in inside for p in holders[box])
            return
        edges = sorted({e for box in inside for e in (box.start[dim], box.stop[dim])})
        for low, high in pairwise(edges):
            here = [box for box in inside if box.start[dim] <= low and high <= box.stop[dim]]
            if here:
                yield from split(dim + 1, here, (*start, low), (*sizes, high - low))

    return list(split(0, boxes, (), ())) if boxes else []
