"""PURE: slices of logical tensors -> who writes which pieces, and which pieces a range needs.

In: for every rank, the ranges it holds of every tensor (replicas allowed). Out: pieces of bounded size that cover
each tensor once, each with the rank that writes it. Works on names and ints alone. Next: `tensor_file`, `index`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

PIECE_BYTES = 16 << 20
"""A piece is read and checked whole, so it bounds what a rank reads beyond its own ranges."""


class ShardLike(Protocol):
    """One rank's part of a logical tensor, as `zero_core.sharded_state` describes it."""

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """`(start,)`: first element of the part in the flattened (row-major) tensor."""

    @property
    def local(self) -> torch.Tensor:
        """The part, 1-D and contiguous."""


@dataclass(frozen=True)
class Range:
    """Elements `start` to `stop` of the flattened tensor of shape `shape`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int

    @property
    def whole(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @staticmethod
    def of(shard: ShardLike) -> Range:
        """The range that a shard covers."""
        return Range(
            shard.global_shape, shard.dtype, shard.offsets[0], shard.offsets[0] + shard.local.numel()
        )


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of a tensor: one entry in the file of `rank`."""

    start: int
    stop: int
    rank: int


@dataclass(frozen=True)
class TensorPlan:
    """One tensor and the pieces that cover it, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]


def piece_key(name: str, piece: Piece) -> str:
    """Name of a piece in its file."""
    return f"{name}@{piece.start}"


def plan_pieces(
    holdings: Sequence[Mapping[str, Range]], piece_bytes: int = PIECE_BYTES
) -> dict[str, TensorPlan]:
    """Decide which rank writes what, so that every element of every tensor is written once.

    Args:
        holdings: For each rank, the ranges it holds; a tensor may be held by several ranks.
        piece_bytes: Upper bound of a piece.

    Returns:
        By name, in order. What several ranks hold is spread over them, tensor by tensor.

    Raises:
        ValueError: If ranks disagree about a tensor's shape or dtype, or nobody holds some part of one.
    """
    plans: dict[str, TensorPlan] = {}
    names = sorted({name for held in holdings for name in held})
    for turn, name in enumerate(names):
        held = [(rank, ranges[name]) for rank, ranges in enumerate(holdings) if name in ranges]
        first = held[0][1]
        if any((item.shape, item.dtype) != (first.shape, first.dtype) for _, item in held):
            described = ", ".join(f"rank {rank}: {tuple(r.shape)} {r.dtype}" for rank, r in held)
            raise ValueError(f"{name!r}: ranks disagree about it: {described}")
        per_piece = max(1, piece_bytes // first.dtype.itemsize)
        pieces = tuple(
            Piece(lo, min(lo + per_piece, stop), rank)
            for rank, start, stop in _cover(name, held, turn)
            for lo in range(start, max(stop, start + 1), per_piece)
        )
        plans[name] = TensorPlan(first.shape, first.dtype, pieces)
    return plans


def _cover(name: str, held: list[tuple[int, Range]], turn: int) -> list[tuple[int, int, int]]:
    """(rank, start, stop) parts that cover the tensor once."""
    whole = held[0][1].whole
    if whole == 0:
        return [(held[turn % len(held)][0], 0, 0)]
    parts, position = [], 0
    while position < whole:
        here = [(rank, r) for rank, r in held if r.start <= position < r.stop]
        if not here:
            raise ValueError(f"{name!r}: no rank holds element {position} of {whole}")
        furthest = max(r.stop for _, r in here)
        ranks = [rank for rank, r in here if r.stop == furthest]
        parts.append((ranks[turn % len(ranks)], position, furthest))
        position = furthest
    return parts


def overlapping(stops: Sequence[int], start: int, stop: int) -> range:
    """Which of consecutive pieces (given where each stops) share elements with `start` to `stop`."""
    if start == stop:
        return range(0)
    first = next((i for i, end in enumerate(stops) if end > start), len(stops))
    last = next((i for i, end in enumerate(stops) if end >= stop), len(stops) - 1)
    return range(first, last + 1)
