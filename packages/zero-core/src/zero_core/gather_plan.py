"""PURE: the recorded order of use of units, and from it what to gather ahead and what to keep.

In: "unit u is used now". Out: units to gather next, within a byte budget; whether a unit that is done with will be
the next one used. The order is recorded in each pass (from one outermost forward to the next) and believed as long
as uses follow it; at the first departure nothing more is predicted until the next pass has been recorded.
"""

from __future__ import annotations

from collections.abc import Sequence


class GatherPlan:
    """Prefetch decisions for one kind of pass (with gradients, or without).

    Args:
        sizes: bytes of each unit when whole.
        budget_bytes: bytes that may be gathered ahead of use at once; 0 for none.
    """

    def __init__(self, sizes: Sequence[int], budget_bytes: int) -> None:
        self.sizes = sizes
        self.budget_bytes = budget_bytes
        self.order: list[int] = []
        self._now: list[int] = []
        self._believed = False

    def begin(self) -> None:
        """A new pass: what the last one did is now the expectation."""
        if self._now:
            self.order = self._now
        self._now = []
        self._believed = bool(self.order)

    def use(self, unit: int) -> list[int]:
        """`unit` is used now; returns the units to gather ahead, soonest first (some may be whole already)."""
        position = len(self._now)
        self._now.append(unit)
        if not (self._believed and position < len(self.order) and self.order[position] == unit):
            self._believed = False
            return []
        ahead: list[int] = []
        left = self.budget_bytes
        for candidate in self.order[position + 1 :]:
            if candidate == unit or candidate in ahead:
                continue
            left -= self.sizes[candidate]
            if left < 0:
                break
            ahead.append(candidate)
        return ahead

    def next_is(self, unit: int) -> bool:
        """Whether the next use expected is of `unit` (so that it should stay whole)."""
        position = len(self._now)
        return self._believed and position < len(self.order) and self.order[position] == unit
