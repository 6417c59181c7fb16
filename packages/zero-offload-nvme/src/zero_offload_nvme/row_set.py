"""Chosen rows of a unit's flat tensors: out into a compact tensor, and back.

In: for each parameter, runs of rows and which of them. Out: a `RowSet`, which knows where each lies in a compact tensor
of their elements alone. Next: `compact_rows` keeps such tensors on the device, `row_publisher` sends them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from .importance import Rows

_SHORT = 64
"""Elements of a piece: shorter ones cost more than a further call."""


@dataclass
class _Band:
    """Neighbouring runs as pieces of one width, so that one call moves them all.

    Attributes:
        base: element of the shard where pieces begin to be counted.
        width: of a piece; divides the width of every row and the distance of every run.
        at: first element in the compact tensor.
        rows: the chosen rows: where they begin, from `base`, and how long each is.
        pieces: their numbers.
    """

    base: int
    width: int
    at: int
    rows: list[tuple[torch.Tensor, int]]
    pieces: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def widths_with(self, rows: Rows) -> int:
        return math.gcd(self.width, rows.width, rows.start - self.base)

    def end(self, device: torch.device) -> int:
        """Count the pieces; returns where the next band begins in the compact tensor."""
        numbers = [
            (starts // self.width).view(-1, 1) + torch.arange(length // self.width)
            for starts, length in self.rows
        ]
        self.pieces = torch.cat([each.flatten() for each in numbers]).to(device)
        return self.at + self.pieces.numel() * self.width

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        num = (flat.numel() - self.base) // self.width
        return flat[self.base : self.base + num * self.width].view(num, self.width)

    def inside(self, compact: torch.Tensor) -> torch.Tensor:
        return compact[self.at : self.at + self.pieces.numel() * self.width].view(-1, self.width)


class RowSet:
    """Rows of one shard.

    Args:
        picked: for each slot by its number, runs with the numbers of their chosen pieces.
        device: where the compact tensors are.

    Attributes:
        spans: slot -> its range in a compact tensor.
        numel: of a compact tensor.
        device: where compact tensors are.
    """

    def __init__(
        self, picked: Mapping[int, Iterable[tuple[Rows, torch.Tensor]]], device: torch.device
    ) -> None:
        self.numel = 0
        self.device = device
        self.spans: dict[int, tuple[int, int]] = {}
        self._bands: list[_Band] = []
        at = 0
        for slot, runs in picked.items():
            start = at
            for rows, pieces in runs:
                self._append(rows, pieces, at)
                at += len(pieces) * rows.width
            self.spans[slot] = (start, at)
        for band in self._bands:
            self.numel = band.end(device)

    def _append(self, rows: Rows, pieces: torch.Tensor, at: int) -> None:
        last = self._bands[-1] if self._bands else None
        width = 0 if last is None else last.widths_with(rows)
        if last is None or width < min(_SHORT, last.width, rows.width):
            last = _Band(rows.start, rows.width, at, [])
            self._bands.append(last)
        else:
            last.width = width
        last.rows.append((pieces * rows.width + (rows.start - last.base), rows.width))

    def take(self, flat: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fill `out`, compact, from a shard; either may be on the host, and of any dtype."""
        is_like = flat.device == out.device and flat.dtype == out.dtype
        for band in self._bands:
            source, inside = band.of(flat), band.inside(out)
            if is_like:
                torch.index_select(source, 0, band.pieces, out=inside)
            else:
                inside.copy_(source.index_select(0, band.pieces.to(flat.device)))
        return out

    def put(self, compact: torch.Tensor, flat: torch.Tensor) -> None:
        """Write compact values to their rows of a shard, in its dtype."""
        for band in self._bands:
            inside = band.inside(compact).to(flat.device, flat.dtype)
            band.of(flat).index_copy_(0, band.pieces.to(flat.device), inside)

    def scale(self, flat: torch.Tensor, factors: Mapping[int, float]) -> None:
        """Multiply rows of a shard by a factor for each slot."""
        if any(factor != 1 for factor in factors.values()):
            compact = self.take(flat, flat.new_empty(self.numel))
            for slot, (start, stop) in self.spans.items():
                compact[start:stop].mul_(factors.get(slot, 1.0))
            self.put(compact, flat)
