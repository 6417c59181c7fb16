"""What a torch optimizer was built on becomes what this rank holds of it.

In: an optimizer on the model's parameters. Out: its groups with this rank's slices in their place (`ShardSlot`), and
the list of all it claims, from which `whole` deals out whole parameters. Next: `optimizer` steps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from .config import Precision
from .errors import ZeroConfigError
from .flat_unit import FlatUnit
from .layout import LocalSlot, Slot
from .steppers import PER_TENSOR, ShardSlot, check_elementwise


@dataclass(frozen=True)
class Claim:
    """A trainable parameter that an optimizer was built on, with the group and the state that it had there."""

    unit: FlatUnit
    index: int
    group: dict[str, Any]
    state: dict[str, Any] | None

    @property
    def slot(self) -> Slot:
        """The parameter's place in its unit."""
        return self.unit.layout.slots[self.index]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole master."""
        assert self.unit.master is not None
        return self.slot.numel * self.unit.master.element_size()

    def state_like(self, master: torch.Tensor) -> dict[str, Any]:
        """The state, whole, in the master's dtype and on its device; step counts stay as they are."""
        return {
            key: value.to(master, copy=True)
            if key != "step" and isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for key, value in (self.state or {}).items()
        }

    def part_of_state(self, place: LocalSlot, master: torch.Tensor) -> dict[str, Any]:
        """The state of this rank's part of the parameter: slices of what has the parameter's shape."""
        lo, hi = place.param_start, place.param_start + place.numel
        return {
            key: value.reshape(-1)[lo:hi].to(master, copy=True)
            if key != "step" and isinstance(value, torch.Tensor) and value.shape == self.slot.shape
            else value
            for key, value in (self.state or {}).items()
        }


def steps_whole_tensors(inner: Optimizer, asked: bool | None) -> bool:
    """Whether `inner` is to be given whole parameters: as asked, else if it is one of torch's that need them.

    Raises:
        ZeroConfigError: `inner` needs them and slices were asked for; or it needs more than one parameter at a time,
            or sparse gradients.
    """
    if isinstance(inner, LBFGS):
        raise ZeroConfigError(
            "LBFGS looks at all parameters at once, and a rank steps some of them; use an optimizer whose update of "
            "one parameter needs that parameter alone"
        )
    if isinstance(inner, SparseAdam):
        raise ZeroConfigError("SparseAdam needs sparse gradients, and reductions are dense; use Adam")
    if asked is None:
        return isinstance(inner, PER_TENSOR)
    if not asked:
        check_elementwise(inner)
    return asked


def take_over(
    optimizer: Optimizer, units: Sequence[FlatUnit], precision: Precision, *, whole: bool
) -> tuple[dict[int, list[ShardSlot]], list[Claim]]:
    """Put this rank's slices in the place of an optimizer's parameters, with their part of its state.

    With `whole` the state stays with the claims, and so do the groups' parameters: `whole.WholeStepper` deals them out.

    Returns:
        unit index -> the slots of which this rank has a part, in order; and every trainable parameter, in the order of
        the groups.

    Raises:
        ZeroConfigError: a parameter is not the model's, or all are frozen; nothing was changed.
    """
    where = {id(p): (unit, i) for unit in units for i, p in enumerate(unit.params)}
    _check_parameters(optimizer, where)
    slots: dict[int, list[ShardSlot]] = {}
    claims: list[Claim] = []
    for group in optimizer.param_groups:
        masters: list[nn.Parameter] = []
        for param in group["params"]:
            unit, index = where[id(param)]
            claim = Claim(unit, index, group, optimizer.state.pop(param, None))
            if not unit.trainable:
                continue
            claims.append(claim)
            flat = unit.ensure_master(precision.master_dtype(unit.full.dtype))
            place = next((part for part in unit.local_slots if part.index == index), None)
            if place is None:  # the parameter lies wholly in other ranks' shards
                continue
            master = nn.Parameter(flat[place.start : place.stop])
            if claim.state and not whole:
                optimizer.state[master] = claim.part_of_state(place, flat)
            masters.append(master)
            slots.setdefault(unit.index, []).append(ShardSlot(place, master, group))
        group["params"] = masters
    for parts in slots.values():
        parts.sort(key=lambda slot: slot.place.start)
    return slots, claims


def _check_parameters(optimizer: Optimizer, where: dict[int, tuple[FlatUnit, int]]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    foreign = [tuple(param.shape) for param in params if id(param) not in where]
    if foreign:
        raise ZeroConfigError(
            f"ShardedOptimizer: {len(foreign)} parameter(s) of the optimizer, of shapes {foreign[:4]}, are not the "
            "model's; build the optimizer on the parameters of the model that was sharded, and shard every "
            "model once"
        )
    if params and not any(where[id(param)][0].trainable for param in params):
        raise ZeroConfigError(
            "ShardedOptimizer: every parameter of the optimizer is frozen; nothing can be trained"
        )
