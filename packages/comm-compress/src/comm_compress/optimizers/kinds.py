"""PURE: whose a piece of optimizer state is, and which elements of a bucket it covers."""

from __future__ import annotations

import enum

from ..wire_1bit import chunk_ranges
from .layout import equal_part


class Held(enum.Enum):
    """How the ranks hold a state tensor of a bucket.

    WHOLE: all of it, the same on every rank. PART: an equal part each (as a reduce-scatter leaves it). CHUNK: the chunk
    that the rank serves in the 1-bit all-reduce. OWN: all of it, different on every rank.
    """

    WHOLE = "whole"
    PART = "part"
    CHUNK = "chunk"
    OWN = "own"

    def span(self, numel: int, world: int, rank: int) -> tuple[int, int]:
        """The elements `[start, stop)` of a bucket of `numel` that `rank` holds."""
        if self is Held.PART:
            return equal_part(numel, world, rank)
        if self is Held.CHUNK:
            return chunk_ranges(numel, world)[rank]
        return 0, numel
