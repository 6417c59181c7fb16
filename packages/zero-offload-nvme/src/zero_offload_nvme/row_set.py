"""Chosen rows of a unit's flat tensors: out into a compact tensor, and back.

In: for each parameter, runs of rows and which of them. Out: a `RowSet`, which knows where each lies in a compact tensor
of their elements alone. Next: `zenflow_unit` keeps such tensors on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .importance import Rows


@dataclass(frozen=True)
class _Run:
    rows: Rows
    pieces: torch.Tensor
    at: int

    @property
    def is_all(self) -> bool:
        return self.pieces.numel() == self.rows.num

    def inside(self, compact: torch.Tensor) -> torch.Tensor:
        return compact[self.at : self.at + self.pieces.numel() * self.rows.width].view(-1, self.rows.width)


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
        self._runs: list[_Run] = []
        self._known: tuple[torch.Tensor, torch.Tensor, list[Any]] | None = None
        for slot, runs in picked.items():
            start = self.numel
            for rows, pieces in runs:
                self._runs.append(_Run(rows, pieces.to(device), self.numel))
                self.numel += len(pieces) * rows.width
            self.spans[slot] = (start, self.numel)

    def take(self, flat: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fill `out`, compact, from a shard; either may be on the host, and of any dtype."""
        for run in self._runs:
            source, inside = run.rows.view(flat), run.inside(out)
            if run.is_all:
                inside.copy_(source)
            elif flat.device == out.device and flat.dtype == out.dtype:
                torch.index_select(source, 0, run.pieces, out=inside)
            else:
                inside.copy_(source.index_select(0, run.pieces.to(flat.device)))
        return out

    def put(self, compact: torch.Tensor, flat: torch.Tensor) -> None:
        """Write compact values to their rows of a shard, in its dtype."""
        for target, inside, pieces in self._pairs(compact, flat):
            if pieces is None:
                target.copy_(inside)
            else:
                target.index_copy_(0, pieces.to(flat.device), inside.to(flat.device, flat.dtype))

    def _pairs(
        self, compact: torch.Tensor, flat: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Rows of a shard, their values, and which of the rows; those of the last pair of tensors are kept."""
        if self._known is None or self._known[0] is not compact or self._known[1] is not flat:
            found = [
                (run.rows.view(flat), run.inside(compact), None if run.is_all else run.pieces)
                for run in self._runs
            ]
            self._known = compact, flat, found
        return self._known[2]

    def scale(self, flat: torch.Tensor, factors: Mapping[int, float]) -> None:
        """Multiply rows of a shard by a factor for each slot."""
        if any(factor != 1 for factor in factors.values()):
            compact = self.take(flat, flat.new_empty(self.numel))
            for slot, (start, stop) in self.spans.items():
                compact[start:stop].mul_(factors.get(slot, 1.0))
            self.put(compact, flat)
