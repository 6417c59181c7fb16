"""`shard` and `no_sync`: where the parts are put together, and where the module tree is touched.

`shard` makes units, fills them, and installs the hooks; `Sharded` is what it made, found again from the model or any
submodule by `sharded`. Read `hooks` next for the backward, `gather` for stage 3, `optimizer` for the step.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from .collectives import Collectives, Fate, PlainCollectives, Wire, resolve_group, sibling_group
from .config import Overlap, Precision
from .errors import ReleasedParameterError, ZeroConfigError, ZeroStateError
from .fill import fill_buffers, fill_units
from .flat_unit import FlatUnit
from .gather import Gatherer
from .hooks import Entrance, Reducer
from .params import Residency, release_class
from .units import UnitChoice, find_units

if TYPE_CHECKING:
    from .diagnostics import Meter

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_HANDLE = "_zero_core_sharded"


@dataclass
class Sharded:
    """What `shard` made of a model.

    Attributes:
        units: every unit, in order of definition.
        reducer: takes gradients in and reduces them.
        gatherer: stage 3: makes parameters whole around their use.
        wire: collectives for parameters and verdicts.
        meter: what `diagnostics` counts with, once it was called.
    """

    model: nn.Module
    stage: int
    precision: Precision
    overlap: Overlap
    units: list[FlatUnit]
    wire: Wire
    reducer: Reducer
    gatherer: Gatherer | None
    meter: Meter | None = None
    _removers: list[RemovableHandle] = field(default_factory=list)

    def units_of(self, module: nn.Module) -> list[FlatUnit]:
        """The units that hold parameters of `module`."""
        wanted = {id(param) for param in module.parameters()}
        return [unit for unit in self.units if any(id(param) in wanted for param in unit.params)]

    def install(self) -> None:
        """Hook the model's entry, and let every submodule find this object."""
        self._removers += Entrance(self.units, self.precision, self.reducer).hook(self.model)
        for module in self.model.modules():
            module.__dict__[_HANDLE] = self
        self.model.__dict__["zero_grad"] = self._zero_grad
        generate = getattr(self.model, "generate", None)
        if self.gatherer is not None and callable(generate):
            self.model.__dict__["generate"] = _ended_together(generate, self.gatherer)

    def close(self) -> None:
        """Remove every hook; the parameters stay as they are (make them whole first where that matters)."""
        for remover in self._removers:
            remover.remove()
        self.reducer.unhook()
        if self.gatherer is not None:
            self.gatherer.close()
        for module in self.model.modules():
            module.__dict__.pop(_HANDLE, None)
        for name in ("zero_grad", "generate"):
            self.model.__dict__.pop(name, None)

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """`model.zero_grad()`: the accumulated gradients are not in `param.grad` alone."""
        self.reducer.zero_grad(free=set_to_none)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: hooks and process groups cannot be copied."""
        raise ZeroStateError(
            "copy.deepcopy of a sharded model: build the second model as usual and load full_state_dict(model) into it"
        )


def shard(
    model: ModuleT,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    stage: int,
    units: UnitChoice = None,
    precision: Precision | None = None,
    collectives: Collectives | Callable[[dist.ProcessGroup], Collectives] | None = None,
    overlap: Overlap | None = None,
    init_module: Callable[[nn.Module], None] | None = None,
) -> ModuleT:
    """Shard a model's training state over a mesh; returns the same object, to be used as before.

    Every rank of the mesh must call it with the same model. The first rank's values win (a model built under
    `sharded_init` keeps its own). Parameters keep their identity, so an optimizer may be built before or after.

    Args:
        model: any module; on the CPU, on the mesh's device, or on the meta device.
        mesh: a one-dimensional mesh, a mesh with a dimension "dp", or a process group.
        stage: 0 replicates everything (like DDP), 1 shards optimizer state, 2 gradients too, 3 parameters too.
        units: what is gathered, reduced and freed together: None finds the repeated blocks; or module classes; or
            a predicate `(name, module) -> bool`.
        precision: dtypes; None keeps each parameter's own, with fp32 masters.
        collectives: how bytes travel: an object that implements `Collectives`, or a function that makes one for a
            process group (stage 3 has two of them); None sends them as they are.
        overlap: bytes in flight and the deadline of collectives.
        init_module: fills the parameters and buffers of one module of a meta model; None calls its
            `reset_parameters`.

    Returns:
        `model`.

    Raises:
        ZeroConfigError: an argument cannot be honoured; nothing was changed.
        CollectiveError: a rank did not come.

    Bytes per rank (P parameters, N ranks, k bytes of optimizer state and master per parameter, 2-byte parameters and
    gradients): 4P+kP, 4P+kP/N, 2P+(2+k)P/N, (2+k)P/N for stages 0 to 3; see `plan_memory`.
    Elements on the wire per backward and step: 2P for stages 0 to 2, at most 3P for stage 3.
    Source: ZeRO (Rajbhandari et al., 2020), section 5.
    """
    precision, overlap = precision or Precision(), overlap or Overlap()
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ZeroConfigError(f"stage: expected 0, 1, 2 or 3, got {stage!r}")
    if any(_HANDLE in module.__dict__ for module in model.modules()):
        raise ZeroConfigError(
            "model: it, or a part of it, is sharded already; shard the outermost module, once"
        )
    group = resolve_group(mesh)
    device = _device_of(mesh, group)
    specs = find_units(model, units)

    fate = Fate()

    def wire(of: dist.ProcessGroup) -> Wire:
        made = PlainCollectives(of, overlap.timeout_s) if collectives is None else collectives
        return Wire(of, made(of) if callable(made) else made, device, overlap.timeout_s, fate)

    param_wire = wire(group)
    # Messages between CPU ranks carry tags; elsewhere gathers and reductions may not share a group's one order.
    alone = stage < 3 or (collectives is None and device.type == "cpu")
    reduce_wire = param_wire if alone else wire(sibling_group(group))
    flat_units = [
        FlatUnit(spec, index, group.rank(), group.size(), stage) for index, spec in enumerate(specs)
    ]
    released = release_class(_explain(flat_units))
    fill_units(model, flat_units, precision, param_wire, init_module)
    fill_buffers(model, param_wire)
    param_wire.salt = reduce_wire.salt = param_wire.broadcast_text("name of the model", secrets.token_hex(4))
    reducer = Reducer(flat_units, reduce_wire, precision, overlap)
    gatherer = None
    if stage == 3:
        for unit in flat_units:
            unit.enter(Residency.SHARDED, released)
        council = param_wire
        if device.type != "cpu":
            beside = sibling_group(group, "gloo")
            council = Wire(beside, PlainCollectives(beside), torch.device("cpu"), overlap.timeout_s, fate)
            council.salt = param_wire.salt
        gatherer = Gatherer(model, flat_units, param_wire, council, overlap, released, reducer)
    Sharded(model, stage, precision, overlap, flat_units, param_wire, reducer, gatherer).install()
    return model


def sharded(module: nn.Module) -> Sharded:
    """What `shard` made of the model that `module` is, or is part of.

    Raises:
        ZeroStateError: it was not sharded.
    """
    found = module.__dict__.get(_HANDLE)
    if not isinstance(found, Sharded):
        raise ZeroStateError(
            f"{type(module).__name__} is not part of a sharded model; call zero_core.shard first"
        )
    return found


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients on each rank without communication while the block runs.

    The first backward after the block, or the step, reduces all that has accumulated. Full gradients live meanwhile,
    in every stage: in stages 2 and 3 that costs the memory which a reduction in every backward saves.
    """
    reducer = sharded(model).reducer
    before, reducer.sync = reducer.sync, False
    try:
        yield
    finally:
        reducer.sync = before


def _ended_together(generate: Callable[..., Any], gatherer: Gatherer) -> Callable[..., Any]:
    """`generate`, ended on no rank before it has ended on all: others need this rank's shards for their last tokens."""

    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        gatherer.assemble()
        return result

    return call


def _device_of(mesh: DeviceMesh | dist.ProcessGroup, group: dist.ProcessGroup) -> torch.device:
    kind = (
        mesh.device_type
        if isinstance(mesh, DeviceMesh)
        else str(dist.distributed_c10d._get_pg_default_device(group))
    )
    kind = torch.device(kind).type
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _explain(units: list[FlatUnit]) -> Callable[[nn.Parameter], str]:
    """The message for a parameter whose values were touched while it was released."""
    where = {id(param): (unit, i) for unit in units for i, param in enumerate(unit.params)}

    def explain(param: nn.Parameter) -> str:
        unit, index = where[id(param)]
        return (
            f"parameter '{unit.layout.slots[index].name}' {tuple(param.shape)} of unit '{unit.name}' rests as shards "
            "(stage 3): its values are whole only inside the unit's forward and backward. Use `with "
            "zero_core.materialized(model):` (write=True to change it), `stream_full` or `full_state_dict`; if another "
            "module computes with it, make the module that contains both a unit (shard(units=...))"
        )

    return explain


__all__ = ["ReleasedParameterError", "Sharded", "no_sync", "shard", "sharded"]
