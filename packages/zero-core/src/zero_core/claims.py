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
        raise ZeroConfigError("SparseAdam needs sparse gradients, and shards have dense ones; use Adam")
    if asked is None:
        return isinstance(inner, PER_TENSOR)
    if not asked:
        check_elementwise(inner)
    return asked


@dataclass(frozen=True)
class TakenOver:
    """What became of an optimizer's parameters.

    Attributes:
        slots: unit index -> the slots of which this rank has a part, in order.
        claims: every trainable parameter, in the order of the groups.
        dormant: the frozen ones with their groups; they are claimed once they need gradients.
    """

    slots: dict[int, list[ShardSlot]]
    claims: list[Claim]
    dormant: list[tuple[nn.Parameter, dict[str, Any]]]


def take_over(
    optimizer: Optimizer,
    params: Sequence[tuple[nn.Parameter, dict[str, Any]]],
    units: Sequence[FlatUnit],
    precision: Precision,
    *,
    whole: bool,
) -> TakenOver:
    """Put this rank's slices in the place of parameters in an optimizer's groups, with their part of its state.

    With `whole` the state stays with the claims, and so do the parameters: `whole.WholeStepper` deals them out.

    Args:
        optimizer: the torch optimizer.
        params: parameters with the groups they are in.
        units: of the model.
        precision: says which dtype masters have.
        whole: see above.

    Raises:
        ZeroConfigError: a parameter is not the model's; nothing was changed.
    """
    where = {id(p): (unit, i) for unit in units for i, p in enumerate(unit.params)}
    foreign = [tuple(param.shape) for param, _ in params if id(param) not in where]
    if foreign:
        raise ZeroConfigError(
            f"ShardedOptimizer: {len(foreign)} parameter(s) of the optimizer, of shapes {foreign[:4]}, are not the "
            "model's; build the optimizer on the parameters of the model that was sharded, and shard every "
            "model once"
        )
    taken = TakenOver({}, [], [])
    left = {id(param) for param, _ in params}
    for group in {id(group): group for _, group in params}.values():
        group["params"] = [param for param in group["params"] if id(param) not in left]
    for param, group in params:
        unit, index = where[id(param)]
        if not unit.trainable:
            optimizer.state.pop(param, None)
            taken.dormant.append((param, group))
            continue
        claim = Claim(unit, index, group, optimizer.state.pop(param, None))
        taken.claims.append(claim)
        flat = unit.ensure_master(precision.master_dtype(unit.dtype))
        place = next((part for part in unit.local_slots if part.index == index), None)
        if place is None:  # the parameter lies wholly in other ranks' shards
            continue
        master = nn.Parameter(flat[place.start : place.stop])
        taken.slots.setdefault(unit.index, []).append(ShardSlot(place, master, group))
        if not whole:
            group["params"].append(master)
            if claim.state:
                optimizer.state[master] = claim.part_of_state(place, flat)
    for parts in taken.slots.values():
        parts.sort(key=lambda slot: slot.place.start)
    return taken
