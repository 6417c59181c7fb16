"""Values from the rank that stepped them to the full parameters of all ranks, stages 1 and 2.

In: units with their chosen channels, of all ranks. Out: those rows of `full`, everywhere, by one all-gather of nothing
else for all units together; what waits is not sent. Or whole units. `wire_beside`: for a thread that does so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from zero_core.collectives import PlainCollectives, Wire
from zero_core.flat_unit import FlatUnit
from zero_core.groups import sibling_group

from .importance import num_channels, pick, rows_in
from .row_set import RowSet
from .zenflow_unit import ZenUnit


@dataclass(frozen=True)
class _Part:
    """One rank's rows of one unit, where they lie in what that rank sends, and that rank's part of `full`."""

    unit: FlatUnit
    target: torch.Tensor
    rank: int
    rows: RowSet
    at: int


class RowPublisher:
    """See the module.

    Args:
        zens: units; every rank gives the same, with the same channels chosen.
        wire: the ranks that share one set of shards.
    """

    def __init__(self, zens: Sequence[ZenUnit], wire: Wire) -> None:
        self._wire = wire
        self._name = "chosen rows of " + (zens[0].unit.label if len(zens) == 1 else "all units")
        self._parts: dict[torch.dtype, list[_Part]] = {}
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        world = wire.group.size()
        for dtype in dict.fromkeys(zen.unit.dtype for zen in zens):
            parts, sizes = self._parts.setdefault(dtype, []), [0] * world
            for zen in (each for each in zens if each.unit.dtype == dtype):
                for rank in range(world):
                    rows = rows_of_rank(zen, rank)
                    start, stop = zen.unit.layout.shard_range(rank)
                    parts.append(_Part(zen.unit, zen.unit.full[start:stop], rank, rows, sizes[rank]))
                    sizes[rank] += rows.numel
            if max(sizes):
                self._buffers[dtype] = torch.zeros(world, max(sizes), dtype=dtype, device=zens[0].unit.device)

    def publish(self, zens: Iterable[ZenUnit]) -> None:
        """Send this rank's rows and receive those of the others; every rank calls it."""
        mine = {zen.unit.index: zen.published for zen in zens}
        own, pending = self._wire.group.rank(), []
        for dtype, buffer in self._buffers.items():
            for part in self._parts[dtype]:
                if part.rank == own:
                    buffer[own, part.at : part.at + part.rows.numel].copy_(mine[part.unit.index])
            pending.append(self._wire.gather(self._name, buffer[own], buffer.view(-1)))
        for (dtype, buffer), each in zip(self._buffers.items(), pending, strict=True):
            each.wait()
            for part in self._parts[dtype]:
                if part.rank != own:
                    part.rows.put(buffer[part.rank, part.at : part.at + part.rows.numel], part.target)


def publish_whole(unit: FlatUnit, full: torch.Tensor, wire: Wire) -> None:
    """Send this rank's shard of a unit and receive those of the others in `full`, its own; every rank calls it."""
    wire.gather(unit.label, unit.to_gather(full), full).wait()


def wire_beside(wire: Wire) -> Wire | None:
    """For a thread that publishes while others use `wire`: the same ranks; every one of them calls it.

    None where the values would not travel as they are, and on an accelerator, whose collectives have one order for all
    threads of a rank.
    """
    if wire.device.type != "cpu" or not isinstance(wire.collectives, PlainCollectives):
        return None
    group = sibling_group(wire.group)
    beside = Wire(group, PlainCollectives(group, wire.timeout_s), wire.device, wire.timeout_s, wire.fate)
    beside.connect()
    return beside


def rows_of_rank(zen: ZenUnit, rank: int) -> RowSet:
    """The chosen rows that a rank holds, as that rank itself would list them."""
    layout = zen.unit.layout
    places = layout.local_slots(*layout.shard_range(rank))
    picked = {
        place.index: pick(rows_in(place), zen.chosen[place.index])
        for place in sorted(places, key=lambda place: place.start)
        if place.index in zen.chosen
    }
    return RowSet(picked, zen.unit.device)


def learn_choices(zens: Sequence[ZenUnit], wire: Wire) -> None:
    """Have every rank know which channels are chosen on any; every rank calls it, with the same units."""
    masks: list[torch.Tensor] = []
    for zen in zens:
        mine = {slot.place.index for slot in zen.slots}
        for index, slot in enumerate(zen.unit.layout.slots):
            none = torch.zeros(num_channels(slot.shape) or 1, dtype=torch.bool)
            masks.append(zen.chosen[index] if index in mine else none)
    flags = torch.cat(masks).to(wire.device, torch.int32)
    wire.all_reduce("chosen channels", flags, dist.ReduceOp.MAX).wait()
    known = iter(flags.cpu().bool().split([len(mask) for mask in masks]))
    for zen in zens:
        masks_of = {index: next(known).clone() for index in range(len(zen.unit.layout.slots))}
        zen.chosen |= {index: mask for index, mask in masks_of.items() if bool(mask.any())}
