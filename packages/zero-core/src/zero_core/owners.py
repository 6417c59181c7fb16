"""PURE: which rank steps which whole parameter, and which parts of it come from where.

In: sizes and layouts. Out: an owner for each parameter, and for any two ranks the parts that travel between them.
Works on ints; no tensor, no device. Next: `whole` moves the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .layout import LocalSlot, UnitLayout


def assign_owners(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Give each parameter to one rank: the largest first, each to the rank that has least so far.

    The same on every rank, since nothing but the arguments decides; ties go to the first parameter and the first rank.

    Args:
        sizes: bytes of each parameter.
        loads: bytes of what each rank owns already.

    Returns:
        the owner of each parameter. From loads of zero, no rank has more than an equal share and one parameter.

    Source: Graham, Bounds on multiprocessing timing anomalies (1969), the LPT rule.
    """
    owners, sums = [0] * len(sizes), list(loads)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(len(sums)), key=sums.__getitem__)
        sums[owners[index]] += sizes[index]
    return owners


@dataclass(frozen=True)
class Routes:
    """One unit's parameters between the ranks that hold parts of them and the ranks that own them.

    Attributes:
        layout: where the parameters lie.
        owners: slot -> the rank that owns it; slots that are not in it stay where they are.
    """

    layout: UnitLayout
    owners: Mapping[int, int]

    @cached_property
    def _parts(self) -> list[dict[int, list[LocalSlot]]]:
        """For each rank that holds parts, and each owner: the parts, in order."""
        found: list[dict[int, list[LocalSlot]]] = []
        for rank in range(self.layout.world_size):
            held: dict[int, list[LocalSlot]] = {}
            for part in self.layout.local_slots(*self.layout.shard_range(rank)):
                if part.index in self.owners:
                    held.setdefault(self.owners[part.index], []).append(part)
            found.append(held)
        return found

    def parts(self, holder: int, owner: int, moving: Collection[int]) -> list[LocalSlot]:
        """What `holder` has in its shard of the slots `moving` that `owner` owns, in order; ranges are the shard's."""
        return [part for part in self._parts[holder].get(owner, ()) if part.index in moving]
