"""The first values of every unit: from a model in memory, from `sharded_init`, or by initialising a meta model.

In: a model and its empty units. Out: filled flat buffers, parameters that are views into them, shards cut. One unit
at a time, so that beyond the shards (stage 3) no rank needs memory for more than the largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import swap_tensors

from .collectives import Wire
from .config import Precision
from .errors import CollectiveError, ZeroConfigError
from .flat_unit import FlatUnit
from .params import ReleasedParameter, free_storage


def fill_units(
    model: nn.Module,
    units: list[FlatUnit],
    precision: Precision,
    wire: Wire,
    replicas: Wire | None,
    init_module: Callable[[nn.Module], None] | None,
) -> None:
    """Give every unit its buffers and values, and make the parameters views of them.

    `wire` is that of all ranks, `replicas` that of those which hold the same shard, if others do.
    """
    _make_room(units, precision, wire)
    initialisers = _meta_initialisers(model, units, init_module)
    for unit, initialise in zip(units, initialisers, strict=True):
        own = unit.params[0].dtype
        views = unit.allocate(precision.param_dtype(own), wire.device)
        agreed = True
        for position, (param, view) in enumerate(zip(unit.params, views, strict=True)):
            if param.is_meta:
                view.zero_()
                swap_tensors(param, nn.Parameter(torch.empty(0), requires_grad=param.requires_grad))
                agreed = False
            elif isinstance(param, ReleasedParameter):
                type(param).restore(param)
                unit.classes[position] = type(param)
                view.copy_(param.detach())
            else:
                view.copy_(param.detach())
                agreed = False
            param.data = view  # and not nn.Parameter(view), which would share the buffer's version counter
        for module in initialise:
            with torch.no_grad():
                (init_module or _reset)(module)
        if not agreed:
            wire.broadcast(unit.label, unit.full)
        unit.cut()
        if (
            agreed and replicas is not None
        ):  # every set of shards was built from its own ranks' random numbers
            values = unit.values()
            replicas.broadcast(unit.label, values)
            unit.set_values(values)
        if unit.stage == 3:
            free_storage(unit.full)


def _make_room(units: list[FlatUnit], precision: Precision, wire: Wire) -> None:
    """Have stores set aside what all shards take, on all ranks or on none, while the model is as it was.

    Raises:
        OSError, MemoryError: what the store of this rank said.
        CollectiveError: another rank's has no room.
    """
    if not any(unit.shard_store is not None for unit in units):
        return
    failure: Exception | None = None
    try:
        for unit in units:
            unit.make_room(precision.param_dtype(unit.params[0].dtype))
    except (OSError, MemoryError) as error:
        failure = error
    failed = torch.tensor([float(failure is not None)], device=wire.device)
    wire.all_reduce("agreement on room for shards", failed, dist.ReduceOp.SUM).wait()
    if not failed.item():
        return
    for unit in units:
        if unit.shard_store is not None:
            unit.shard_store.release(unit.key("param"))
    if failure is not None:
        raise failure
    raise CollectiveError(
        "shard: another rank's store has no room for its shards, and says so there; nothing was changed here"
    )


def fill_buffers(model: nn.Module, wire: Wire) -> None:
    """Buffers stay whole on every rank: move them to the device, with the first rank's values."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                placed = buffer.to(wire.device).contiguous()
                module._buffers[name] = placed
                wire.broadcast(f"buffer '{prefix}.{name}'", placed)


def _meta_initialisers(
    model: nn.Module, units: list[FlatUnit], init_module: Callable[[nn.Module], None] | None
) -> list[list[nn.Module]]:
    """For each unit, the modules to initialise once it has memory.

    Raises:
        ZeroConfigError: a module on the meta device cannot initialise itself, or spans units.
    """
    unit_of = {id(param): unit.index for unit in units for param in unit.params}
    per_unit: list[list[nn.Module]] = [[] for _ in units]
    found: list[tuple[nn.Module, str]] = []
    for name, module in model.named_modules():
        params = [param for param in module._parameters.values() if param is not None and param.is_meta]
        buffers = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not params and not buffers:
            continue
        homes = {unit_of[id(param)] for param in params}
        label = f"module '{name}' ({type(module).__name__})"
        if init_module is None and not callable(getattr(module, "reset_parameters", None)):
            raise ZeroConfigError(
                f"{label} is on the meta device and has no reset_parameters: pass init_module=, or build the model "
                "under zero_core.sharded_init"
            )
        if len(homes) > 1:
            raise ZeroConfigError(
                f"{label} is on the meta device and its parameters belong to several units (different dtypes, or "
                "tied elsewhere): build the model under zero_core.sharded_init"
            )
        found += [(module, key) for key in buffers]
        per_unit[homes.pop() if homes else 0].append(module)
    for module, key in found:  # only now: nothing can be refused any more
        buffer = module._buffers[key]
        assert buffer is not None
        module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return per_unit


def _reset(module: nn.Module) -> None:
    module.reset_parameters()  # type: ignore[operator]  # _meta_initialisers has checked that it is there
