"""The most important channels of all parameters, on all ranks together.

In: the units of a step. Out: for each matrix its channels' importance and which are the best, the same on every rank.
One all-reduce of a number a channel; `importance` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from zero_core import UnitStep
from zero_core.collectives import Wire

from .importance import importance, most_important, num_channels, num_chosen, rows_in
from .zenflow_unit import ZenUnit


def most_important_channels(
    items: Sequence[UnitStep], units: Mapping[int, ZenUnit], ratio: float, wire: Wire
) -> tuple[dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]], float]:
    """Every rank calls it.

    Args:
        items: what moves; the same units on every rank.
        units: by index, for what is chosen now.
        ratio: the part of each parameter's channels that is wanted.
        wire: the ranks that share one set of shards.

    Returns:
        By unit and slot: importance, fp32 [channels], and which are the best, bool [channels]; and the importance of
        the channels that are chosen now, added up over all parameters.
    """
    parts: dict[tuple[int, int], torch.Tensor] = {}
    held = torch.zeros(1)
    for item in items:
        mine = {slot.place.index: slot.place for slot in item.slots}
        for index in sorted(item.moving):
            shape = item.unit.layout.slots[index].shape
            channels = num_channels(shape)
            if not channels:
                continue
            values = torch.zeros(channels)
            if index in mine:
                place = mine[index]
                rows = rows_in(place)
                values = importance(item.grad, rows, channels).cpu()
                held += values[units[item.unit.index].chosen[index]].sum()
            parts[item.unit.index, index] = values
    vector = torch.cat([*parts.values(), held]).to(wire.device)
    wire.all_reduce("importance of channels", vector, dist.ReduceOp.SUM).wait()
    vector = vector.cpu()
    found = {}
    summed = vector[:-1].split([len(part) for part in parts.values()])
    for key, values in zip(parts, summed, strict=True):
        best = torch.zeros(len(values), dtype=torch.bool)
        best[most_important(values, num_chosen(len(values), ratio))] = True
        found[key] = (values, best)
    return found, float(vector[-1])
