"""PURE: parameters -> chunks of one size that travel and are stepped one after the other.

In: numbers of elements. Out: for each chunk the pieces of parameters that it holds, in order. Large parameters are cut,
small ones share a chunk, so that what is under way is bounded and no copy is much longer than the step beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Elements `[start, stop)` of parameter `index`, at `offset` of its chunk's buffer."""

    index: int
    start: int
    stop: int
    offset: int


def plan_chunks(numels: Sequence[int], chunk_elements: int, *, align: int = 32) -> list[list[Piece]]:
    """Cut a list of parameters into chunks.

    Args:
        numels: elements of each parameter; those of none get no piece.
        chunk_elements: the most that a chunk's buffer holds; a multiple of `align`.
        align: pieces begin at multiples of this many elements.

    Returns:
        Chunks of pieces; every element lies in exactly one piece, in order.
    """
    chunks: list[list[Piece]] = []
    used = chunk_elements
    for index, numel in enumerate(numels):
        start = 0
        while start < numel:
            if used >= chunk_elements:
                chunks.append([])
                used = 0
            stop = min(numel, start + chunk_elements - used)
            chunks[-1].append(Piece(index, start, stop, used))
            used += -(-(stop - start) // align) * align
            start = stop
    return chunks
