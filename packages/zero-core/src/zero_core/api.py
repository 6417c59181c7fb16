"""`shard` and `no_sync`: where the parts are put together, and where the module tree is touched.

`shard` makes units, fills them, and installs the hooks; `Sharded` is what it made, found again from the model or any
submodule by `sharded`. Read `hooks` next for the backward, `gather` for stage 3, `optimizer` for the step.
"""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from .collectives import Collectives, Wire
from .config import Overlap, Placement, Precision, refuse_what_has_no_effect
from .errors import ReleasedParameterError, ZeroConfigError, ZeroStateError
from .fill import fill_buffers, fill_units
from .flat_unit import FlatUnit
from .gather import Gatherer
from .groups import device_type, resolve_groups
from .hooks import Entrance, Reducer
from .late import LateArrivals
from .overrides import Overrides
from .params import Residency, release_class
from .publish import show
from .stores import ShardStore, Stores
from .units import UnitChoice, UnitSpec, find_units
from .wires import connect

if TYPE_CHECKING:
    from .diagnostics import Meter

logger = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_HANDLE = "_zero_core_sharded"


@dataclass
class Sharded:
    """What `shard` made of a model.

    Attributes:
        units: every unit, in order of definition.
        reducer: takes gradients in and reduces them.
        gatherer: stage 3: makes parameters whole around their use.
        late: waits for parameters that `step` left on their way, where that is wanted.
        wire: collectives for parameters and verdicts, among the ranks that share one set of shards.
        everyone: the wire of these and of their replicas.
        meter: what `diagnostics` counts with, once it was called.
    """

    model: nn.Module
    stage: int
    precision: Precision
    overlap: Overlap
    units: list[FlatUnit]
    wire: Wire
    everyone: Wire
    reducer: Reducer
    gatherer: Gatherer | None
    late: LateArrivals | None = None
    meter: Meter | None = None
    _num_shown: int = 0
    _overrides: Overrides = field(default_factory=Overrides)
    _removers: list[RemovableHandle] = field(default_factory=list)

    def units_of(self, module: nn.Module) -> list[FlatUnit]:
        """The units that hold parameters of `module`."""
        wanted = {id(param) for param in module.parameters()}
        return [unit for unit in self.units if any(id(param) in wanted for param in unit.params)]

    def part(self, module: nn.Module) -> nn.Module:
        """`module`, or the sharded model where `module` is a wrapper around it; names are those of the result."""
        return module if _HANDLE in module.__dict__ else self.model

    def install(self) -> None:
        """Hook the model's entry, and let every submodule find this object."""
        self._removers += Entrance(self.units, self.precision, self.reducer).hook(self.model)
        for module in self.model.modules():
            module.__dict__[_HANDLE] = self
            self.override_zero_grad(module)
        generate = getattr(self.model, "generate", None)
        if self.gatherer is not None and callable(generate):
            self._overrides.set(self.model, "generate", _ended_together(generate, self.gatherer))

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Around a block that shows full values, and that `close` must not be called in."""
        self._num_shown += 1
        try:
            yield
        finally:
            self._num_shown -= 1

    def close(self) -> None:
        """Undo `shard`: the model is an ordinary one with the values it has, on every rank; every rank must call it.

        It may be sharded again. Its optimizers have nothing left to step: build new ones. Accumulated gradients are
        forgotten (stages 1 to 3).

        Raises:
            ZeroStateError: it is called inside `materialized` or `stream_full`; nothing was undone.
            CollectiveError: stage 3: the parameters cannot be gathered; nothing was undone.

        Bytes per rank: at stage 3 the whole model beside the shards, plus one unit.
        """
        from .materialize import exact_values

        if self._num_shown:
            raise ZeroStateError(
                "close: called inside materialized, or before stream_full came to its end; call it after that"
            )
        self.reducer.abandon()
        whole = exact_values(self)
        self.wire.fail(
            "the model is no longer sharded, since it was closed; build an ordinary optimizer for it"
        )
        for remover in self._removers:
            remover.remove()
        self.reducer.unhook()
        if self.gatherer is not None:
            self.gatherer.close()
        if self.late is not None:
            self.late.close()
        for module in self.model.modules():
            module.__dict__.pop(_HANDLE, None)
        self._overrides.restore()
        for unit, values in whole:
            unit.hand_back(values)
        for unit in self.units:
            unit.empty_stores()

    def override_zero_grad(self, module: nn.Module) -> None:
        """Have `module.zero_grad()` forget gradients: what has accumulated is not in `param.grad` alone."""
        own = module.zero_grad

        @functools.wraps(own)
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            owned = None if self.part(module) is self.model else self._slots_of(module)
            self.reducer.zero_grad(owned, free=kwargs.get("set_to_none", all(args)))
            return result

        self._overrides.set(module, "zero_grad", zero_grad)

    def _slots_of(self, module: nn.Module) -> dict[int, set[int]]:
        """Unit index -> the slots of parameters of `module`."""
        wanted = {id(param) for param in module.parameters()}
        return {
            unit.index: {index for index, param in enumerate(unit.params) if id(param) in wanted}
            for unit in self.units
        }

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
    placement: Placement | None = None,
    store: ShardStore | Stores | None = None,
    init_module: Callable[[nn.Module], None] | None = None,
) -> ModuleT:
    """Shard a model's training state over a mesh; returns the same object, to be used as before.

    Every rank of the mesh must call it with the same model. The first rank's values win (a model built under
    `sharded_init` keeps its own). Parameters keep their identity, so an optimizer may be built before or after.

    Args:
        model: any module; on the CPU, on the mesh's device, or on the meta device.
        mesh: a one-dimensional mesh, a mesh with a dimension "dp", or a process group. Dimensions "dp_replicate" and
            "dp_shard" shard inside (a node) and replicate across.
        stage: 0 replicates everything (like DDP), 1 shards optimizer state, 2 gradients too, 3 parameters too.
        units: what is gathered, reduced and freed together: None finds the repeated blocks; or module classes; or
            a predicate `(name, module) -> bool`.
        precision: dtypes; None keeps each parameter's own, with fp32 masters.
        collectives: how bytes travel: an object that implements `Collectives`, or a function that makes one for a
            process group (stage 3 has two of them); None sends them as they are.
        overlap: bytes in flight and the deadline of collectives.
        placement: stage 3: what stays whole between uses.
        store: where shards rest: a store for all that a stage shards, or `Stores` for each kind; None: on the device.
            A store of optimizer state needs an optimizer that steps there (`zero_offload_nvme.OffloadedOptimizer`).
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
    placement = placement or Placement()
    on_meta = any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers()))
    refuse_what_has_no_effect(
        stage, overlap, placement, fills_nothing=init_module is not None and not on_meta
    )
    stores = Stores.of(store, stage)
    groups = resolve_groups(mesh)
    device = _device_of(mesh, groups.shard)
    specs = find_units(model, units, placement.whole_modules)
    wires = connect(mesh, groups, device, stage, collectives, overlap.timeout_s)

    dtypes = list(dict.fromkeys(param.dtype for spec in specs for _, param in spec.params))
    rank, size = groups.shard.rank(), groups.shard.size()
    num_replicas = 1 if groups.replicate is None else groups.replicate.size()
    salt = wires.everyone.broadcast_text("name of the model", secrets.token_hex(4))
    for wire in wires.all:
        wire.salt = salt
    stores = replace(stores, prefix=f"{stores.prefix}{salt}.")
    sizes = [sum(param.numel() for _, param in spec.params) * spec.trainable for spec in specs]
    flat_units = [
        FlatUnit(
            spec,
            index,
            rank,
            size,
            _stage_of(spec, stage, placement, precision),
            num_replicas,
            unit_stores,
        )
        for index, (spec, unit_stores) in enumerate(zip(specs, stores.of_units(sizes), strict=True))
    ]
    for unit in flat_units:
        unit.approximate = unit.stage > 0 and not _is_exact(unit, wires.params, precision)
    released = release_class(_explain(flat_units))
    fill_units(model, flat_units, precision, wires.everyone, wires.replicas, init_module)
    fill_buffers(model, wires.everyone)
    if wires.everyone.group.rank() == 0:
        _announce(len(flat_units), dtypes, stage, precision, size, num_replicas)
    reducer = Reducer(flat_units, wires.grads, wires.everyone, precision, overlap)
    gatherer = None
    if stage == 3:
        for unit in flat_units:
            if unit.stage == 3:
                unit.enter(Residency.SHARDED, released)
        gatherer = Gatherer(model, flat_units, wires.params, wires.council, overlap, released, reducer)
        reducer.council = wires.council_of_all
    for unit in flat_units:
        if unit.approximate and unit.stage < 3:  # what the model computes with, before the first step too
            show(unit, wires.params).wait()
    late = LateArrivals(flat_units) if overlap.publish_late else None
    Sharded(
        model, stage, precision, overlap, flat_units, wires.params, wires.everyone, reducer, gatherer, late
    ).install()
    return model


def _stage_of(spec: UnitSpec, stage: int, placement: Placement, precision: Precision) -> int:
    """A unit that stays whole at stage 3 is one of stage 2."""
    nbytes = sum(p.numel() * precision.param_dtype(p.dtype).itemsize for _, p in spec.params)
    return 2 if spec.stays_whole or 0 < nbytes <= placement.whole_bytes else stage


def _is_exact(unit: FlatUnit, wire: Wire, precision: Precision) -> bool:
    """Whether the unit is computed with as its shards have it."""
    dtype = precision.param_dtype(unit.params[0].dtype)
    return wire.is_exact(unit.layout.numel * dtype.itemsize, dtype, trainable=unit.trainable)


def sharded(module: nn.Module) -> Sharded:
    """What `shard` made of the model that `module` is, is part of, or wraps (as what `torch.compile` returns does).

    Raises:
        ZeroStateError: it was not sharded, or wraps several that were.
    """
    found = module.__dict__.get(_HANDLE)
    if isinstance(found, Sharded):
        return found
    handles = (part.__dict__.get(_HANDLE) for part in module.modules())
    inside = {id(handle): handle for handle in handles if isinstance(handle, Sharded)}
    if len(inside) != 1:
        what = "is not part of a sharded model; call zero_core.shard first"
        if inside:
            what = f"contains {len(inside)} sharded models; pass one of them"
        raise ZeroStateError(f"{type(module).__name__} {what}")
    found = inside.popitem()[1]
    found.override_zero_grad(module)
    return found


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients on each rank without communication while the block runs.

    The first backward after the block, or the step, reduces all that has accumulated. Full gradients live meanwhile,
    in every stage: in stages 2 and 3 that costs the memory which a reduction in every backward saves.

    Ranks may have other numbers of backward passes under it. But the last one before a step, a norm or `get_full` of a
    gradient is under it on every rank, or on none (no pass at all counts as none): else some ranks reduce while others
    step, and all raise `CollectiveError`.
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
    kind = device_type(mesh, group)
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _announce(
    num_units: int,
    dtypes: list[torch.dtype],
    stage: int,
    precision: Precision,
    world_size: int,
    num_replicas: int,
) -> None:
    """Log once what nobody should have to guess."""
    spread = f"{world_size} ranks" + (f", {num_replicas} replicas" if num_replicas > 1 else "")
    logger.info("stage %d over %s: %d units", stage, spread, num_units)
    for own in dtypes:
        logger.info("%s parameters: %s", str(own).removeprefix("torch."), precision.describe(own))


def _explain(units: list[FlatUnit]) -> Callable[[nn.Parameter], str]:
    """The message for a parameter whose values were touched while it was released."""
    where = {id(param): (unit, i) for unit in units for i, param in enumerate(unit.params)}

    def explain(param: nn.Parameter) -> str:
        unit, index = where[id(param)]
        return (
            f"parameter '{unit.layout.slots[index].name}' {tuple(param.shape)} of unit '{unit.name}' rests as shards "
            "(stage 3): its values are whole only inside forward and backward of the model. Use `with "
            "zero_core.materialized(model):` (write=True to change it), `stream_full` or `full_state_dict`; what "
            "computes with it outside, such as a loss, belongs into a forward of the model"
        )

    return explain


__all__ = ["ReleasedParameterError", "Sharded", "no_sync", "shard", "sharded"]
