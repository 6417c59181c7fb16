"""What a torch optimizer was built on becomes what this rank holds of it.

In: an optimizer on the model's parameters. Out: `Member`s in the order in which it was built, and its groups with this
rank's slices in their place (`ShardSlot`), or with the whole parameters that `whole` deals out. Next: `optimizer` steps
them.
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
from .steppers import PER_TENSOR, ShardSlot


@dataclass(eq=False)
class Member:
    """A parameter of the model in a group of an optimizer.

    Attributes:
        unit: that the parameter lies in.
        index: its slot there.
        param: the parameter.
        group: of the torch optimizer.
        label: its name there, if the optimizer was built on `named_parameters()`.
        state: what the optimizer knew of it before it was taken over.
        master: what stands for it in the group on this rank; None: nothing does.
    """

    unit: FlatUnit
    index: int
    param: nn.Parameter
    group: dict[str, Any]
    label: str | None = None
    state: dict[str, Any] | None = None
    master: nn.Parameter | None = None

    @property
    def slot(self) -> Slot:
        """The parameter's place in its unit."""
        return self.unit.layout.slots[self.index]

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return self.slot.name

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
    if not asked and isinstance(inner, PER_TENSOR):
        raise ZeroConfigError(
            f"{type(inner).__name__} updates whole tensors, and a rank steps flat slices of them: it would compute "
            "something else without a word; use an elementwise optimizer such as AdamW"
        )
    return asked


def find_members(groups: Sequence[dict[str, Any]], units: Sequence[FlatUnit]) -> list[Member]:
    """The parameters of an optimizer's groups, in order.

    Raises:
        ZeroConfigError: one is not the model's.
    """
    where = {id(p): (unit, i) for unit in units for i, p in enumerate(unit.params)}
    foreign = [tuple(p.shape) for group in groups for p in group["params"] if id(p) not in where]
    if foreign:
        raise ZeroConfigError(
            f"ShardedOptimizer: {len(foreign)} parameter(s) of the optimizer, of shapes {foreign[:4]}, are not the "
            "model's; build the optimizer on the parameters of the model that was sharded, and shard every "
            "model once"
        )
    return [
        Member(*where[id(param)], param, group, label)
        for group in groups
        for param, label in zip(
            group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True
        )
    ]


def check_trainable(members: Sequence[Member]) -> None:
    """Refuse an optimizer with which nothing can be trained.

    Raises:
        ZeroConfigError: it has no parameters, or frozen ones alone.
    """
    if not members:
        raise ZeroConfigError(
            "ShardedOptimizer: the optimizer has no parameters on this rank (another ShardedOptimizer may hold it "
            "now); build a new one on the model's parameters"
        )
    if not any(member.unit.trainable for member in members):
        raise ZeroConfigError(
            "ShardedOptimizer: every parameter of the optimizer is frozen; nothing can be trained"
        )


def check_stores(members: Sequence[Member]) -> None:
    """Refuse members whose state is to rest in a store, where it would be kept on the device.

    Raises:
        ZeroConfigError: there are some.
    """
    if any(member.unit.trainable and member.unit.stores.optimizer for member in members):
        raise ZeroConfigError(
            "ShardedOptimizer: this model's optimizer state is to rest in a store, and this one would keep it "
            "on the device; use zero_offload_nvme.OffloadedOptimizer (for elementwise optimizers), or no store"
        )


def take_over(
    optimizer: Optimizer, members: Sequence[Member], precision: Precision, *, whole: bool
) -> dict[int, list[ShardSlot]]:
    """Have this rank's slices stand for members, with their part of the optimizer's state; they need gradients.

    With `whole` the state stays with the members, and slices stand for none: `whole.WholeStepper` deals them out.

    Args:
        optimizer: the torch optimizer.
        members: those that it is to step from now on.
        precision: says which dtype masters have.
        whole: see above.

    Returns:
        unit index -> the slots of which this rank has a part, in order.
    """
    slots: dict[int, list[ShardSlot]] = {}
    for member in members:
        unit = member.unit
        flat = unit.ensure_master(precision.master_dtype(unit.dtype))
        member.state = optimizer.state.pop(member.param, None)
        place = next((part for part in unit.local_slots if part.index == member.index), None)
        if place is None:  # the parameter lies wholly in other ranks' shards
            continue
        master = nn.Parameter(flat[place.start : place.stop])
        slots.setdefault(unit.index, []).append(ShardSlot(place, master, member.group))
        if not whole:
            member.master = master
            if member.state:
                optimizer.state[master] = member.part_of_state(place, flat)
    if not whole:
        for member in members:
            member.state = None
    for parts in slots.values():
        parts.sort(key=lambda slot: slot.place.start)
    return slots


def fill_groups(members: Sequence[Member]) -> None:
    """Have groups list what stands for their members, in the order of the members.

    Torch numbers the parameters of a state dict in that order, so it must not depend on when a member was unfrozen.
    """
    for group in {id(member.group): member.group for member in members}.values():
        group["params"] = []
        if "param_names" in group:
            group["param_names"] = []
    for member in members:
        if member.master is not None:
            member.group["params"].append(member.master)
            if "param_names" in member.group:
                member.group["param_names"].append(member.label)
