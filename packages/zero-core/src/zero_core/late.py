"""Stages 1 and 2: updated parameters that are still on their way when `step` returns; whoever needs them waits.

In: `publish` hands over the gather of a unit. Out: the unit settled, before its module's forward or when something
touches one of its parameters. Waiting needs no other rank's consent: every rank has launched every gather.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .collectives import Handle
from .flat_unit import FlatUnit
from .params import arriving_class


class LateArrivals:
    """Has the parameters of stages 1 and 2 wait for their updated values where they are used.

    Args:
        units: all units of the model; those of stages 0 and 3 are left alone.
    """

    def __init__(self, units: list[FlatUnit]) -> None:
        gathered = [unit for unit in units if 0 < unit.stage < 3]
        unit_of = {id(param): unit for unit in gathered for param in unit.params}
        self._arriving = arriving_class(lambda param: unit_of[id(param)].settle())
        self._removers: list[RemovableHandle] = []
        for unit in gathered:
            hook = torch.compiler.disable(partial(_settle, unit), recursive=True)  # it talks to other ranks
            self._removers += [
                anchor.register_forward_pre_hook(hook, prepend=True) for anchor in unit.anchors
            ]

    def expect(self, unit: FlatUnit, values: Handle) -> None:
        """New values of `unit` are on their way (such as its gather), and nobody waits for them yet."""
        unit.arrive_late(values.wait, self._arriving)

    def close(self) -> None:
        """Remove the hooks; what is on its way still arrives where it is touched."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()


def _settle(unit: FlatUnit, module: nn.Module, args: Any) -> None:
    if unit.is_arriving:
        unit.settle()
        unit.check_attached()
