"""A range of a file as pieces of memory: tensors where they lie so that the disk can reach them, a buffer elsewhere.

Writes past the page cache want addresses and offsets that are multiples of a page. Of a tensor whose address and offset
differ by such a multiple, all but the two ends is written from where it is; the ends, and what is small or lies
otherwise, pass through the buffer. PURE: nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

DIRECT_BYTES = 64 << 10
"""Less than this is copied: a vector of few long pieces is worth more."""


@dataclass(frozen=True)
class Vector:
    """What `pwritev` takes.

    Attributes:
        views: the memory of the range, in order.
        bounced: what lies in the buffer: its place in the range, and the memory that it comes from.
    """

    views: list[memoryview]
    bounced: list[tuple[int, memoryview]]


def address_of(data: memoryview) -> int:
    """Where in memory the bytes begin."""
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])


def lay_out(buffer: memoryview, nbytes: int, parts: Iterable[tuple[int, memoryview]], align: int) -> Vector:
    """Cut a range of `nbytes` into pieces of memory.

    Args:
        buffer: at least as long, and aligned.
        nbytes: of the range, which begins at a multiple of `align`; the last piece ends there.
        parts: bytes of tensors by their place in the range, ascending, without overlap.
        align: of addresses, and of the ends of pieces.
    """
    views: list[memoryview] = []
    bounced: list[tuple[int, memoryview]] = []
    done = 0
    for at, data in parts:
        low, high = -(-at // align) * align, (at + len(data)) // align * align
        if high - low < DIRECT_BYTES or (address_of(data) - at) % align:
            bounced.append((at, data))
            continue
        if low > done:
            views.append(buffer[done:low])
        views.append(data[low - at : high - at])
        bounced += [(at, data[: low - at]), (high, data[high - at :])]
        done = high
    if nbytes > done:
        views.append(buffer[done:nbytes])
    return Vector(views, [(at, data) for at, data in bounced if data])


def skip(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of a vector after its first bytes."""
    left = list(views)
    while left and nbytes >= len(left[0]):
        nbytes -= len(left.pop(0))
    return [left[0][nbytes:], *left[1:]] if left else []
