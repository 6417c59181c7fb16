"""Which ranks of a model talk about what: parameters, gradients, replicas, meetings.

In: the mesh, and how the user wants bytes to travel. Out: a `Wire` for each purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .collectives import Collectives, Fate, PlainCollectives, Wire
from .groups import Groups, group_of_all, sibling_group
from .hierarchy import HierarchicalCollectives


@dataclass(frozen=True)
class Wires:
    """Who talks to whom about what; several may be one.

    Attributes:
        params, grads: gathers and reductions, among the ranks that share one set of shards.
        replicas: the ranks that hold the same shard, if others do.
        everyone: all ranks.
        council, council_of_all: meetings of `params` and of `everyone`, over the CPU.
    """

    params: Wire
    grads: Wire
    replicas: Wire | None
    everyone: Wire
    council: Wire
    council_of_all: Wire

    @property
    def all(self) -> list[Wire]:
        """Each of them, some more than once."""
        found = (self.params, self.grads, self.replicas, self.everyone, self.council, self.council_of_all)
        return [wire for wire in found if wire is not None]


def connect(
    mesh: DeviceMesh | dist.ProcessGroup,
    groups: Groups,
    device: torch.device,
    stage: int,
    collectives: Collectives | Callable[[dist.ProcessGroup], Collectives] | None,
    timeout_s: float,
) -> Wires:
    """Make the wires of a model; every rank must call it."""
    fate = Fate()

    def plain(group: dist.ProcessGroup) -> Wire:
        return Wire(group, PlainCollectives(group, timeout_s), device, timeout_s, fate)

    def wire(group: dist.ProcessGroup) -> Wire:
        if collectives is None:
            return plain(group)
        made = collectives(group) if callable(collectives) else collectives
        return Wire(group, made, device, timeout_s, fate)

    def council_for(wire: Wire) -> Wire:
        if device.type == "cpu":
            return wire
        beside = sibling_group(wire.group, "gloo")
        return Wire(beside, PlainCollectives(beside, timeout_s), torch.device("cpu"), timeout_s, fate)

    params = wire(groups.shard)
    # Messages between CPU ranks carry tags; elsewhere gathers and reductions may not share a group's one order.
    alone = stage < 3 or (collectives is None and device.type == "cpu")
    grads = params if alone else wire(sibling_group(groups.shard))
    replicas, everyone = None, params
    if groups.replicate is not None:
        replicas, everyone = plain(groups.replicate), plain(group_of_all(mesh, groups))
        if device.type == "cpu":
            replicas.connect()  # while all are here: what goes across is first sent in the middle of a backward
        both = HierarchicalCollectives(grads.collectives, replicas.collectives, groups.replicate)
        grads = Wire(grads.group, both, device, timeout_s, fate)
    council = council_for(params) if stage == 3 else params
    council_of_all = council_for(everyone) if stage == 3 and everyone is not params else council
    return Wires(params, grads, replicas, everyone, council, council_of_all)
