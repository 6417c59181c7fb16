"""PURE: a step over tensors that rest elsewhere, cut into blocks that fit a window of memory.

In: units with the runs of elements that a step updates. Out: blocks in the order in which they are read, stepped and
written, each with its runs. Works on ints. Next: `window` moves them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

DEPTH = 3
"""Blocks in a window: one is read, one stepped, one written."""


LEAST, HUGE_PAGE = 4096, 512 * 1024
"""Elements of 4 bytes: the fewest of a block, in whole pages of memory, and those of a huge page."""


def block_elements(window_bytes: int, num_operands: int, depth: int = DEPTH) -> int:
    """Elements of a block of which `depth`, with so many operands of 4 bytes, fit a window.

    Whole huge pages of each operand, where they are as large: a drive is slower with parts of them.
    """
    most = window_bytes // (depth * num_operands * 4)
    page = HUGE_PAGE if most >= HUGE_PAGE else LEAST
    return max(most // page * page, LEAST)


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of a unit's shard.

    Attributes:
        unit: position of the unit in the step.
        segments: runs of elements with their hyper-parameters, counted from `start`.
        last: it ends its unit.
    """

    unit: int
    start: int
    stop: int
    segments: tuple[Any, ...]
    last: bool

    @property
    def is_covered(self) -> bool:
        """Whether the segments touch every element."""
        return bool(sum(segment.stop - segment.start for segment in self.segments) == self.stop - self.start)


def cut_blocks(
    units: Sequence[tuple[int, Sequence[Any]]], most: int, *, whole: Collection[int] = ()
) -> Iterator[Block]:
    """Cut units into blocks of at most `most` elements; what no segment touches is left out.

    Args:
        units: elements of each unit's shard, and its segments: sorted and disjoint, each with `start` and `stop`.
        most: of a block.
        whole: positions of units of which nothing is left out.
    """
    for position, (numel, segments) in enumerate(units):
        starts = [
            start
            for start in range(0, numel, most)
            if position in whole
            or any(segment.start < min(start + most, numel) and start < segment.stop for segment in segments)
        ]
        for start in starts:
            stop = min(start + most, numel)
            inside = tuple(
                replace(
                    segment, start=max(segment.start, start) - start, stop=min(segment.stop, stop) - start
                )
                for segment in segments
                if segment.start < stop and start < segment.stop
            )
            yield Block(position, start, stop, inside, last=start == starts[-1])
