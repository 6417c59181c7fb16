"""One full tensor by its parameter's name, to read or to change: value, gradient, master, or optimizer state.

In: a sharded model, a plain torch name, and what is wanted of it (`agreement`). Out: the whole tensor on every rank;
and back. Each rank tells the others which elements it holds, so that those which hold nothing learn shape and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from .agreement import Request, agree, nearest
from .errors import ZeroConfigError, ZeroStateError
from .optimizer import ShardedOptimizer
from .publish import show
from .state import Shard, StateHolder


@torch.no_grad()
def get_full(
    model: nn.Module, name: str, *, optimizer: ShardedOptimizer | None = None, what: str = "param"
) -> torch.Tensor:
    """A whole tensor of one parameter, in its true shape, at any stage; every rank must call it alike.

    Args:
        model: a sharded model or a part of it.
        name: the parameter's torch name (any of them, where tied).
        optimizer: needed for masters and optimizer state.
        what: "param"; "grad": the averaged gradient accumulated so far, as the next step will see it before unscaling
            and clipping; "master": what the optimizer updates; or a key of the optimizer's state such as "exp_avg".

    Returns:
        a copy, on every rank, in the dtype that it has there: the parameter's, the accumulate dtype, the master's, the
        state's. Numbers such as "step" are scalar tensors.

    Raises:
        ZeroConfigError: there is no such parameter or state, or the optimizer is missing; on every rank.
        ZeroStateError: there is no gradient, or no state yet; on every rank.

    Bytes per rank: the tensor. On the wire: each rank's part to every other; nothing where all ranks hold all.
    """
    request = agree("get_full", model, name, what, optimizer, None)
    mine = _held(request)
    return _assemble(request, mine, _tell(request, mine))


@torch.no_grad()
def set_full(
    model: nn.Module,
    name: str,
    tensor: torch.Tensor | None,
    *,
    optimizer: ShardedOptimizer | None = None,
    what: str = "param",
) -> None:
    """Change a whole tensor of one parameter, at any stage; every rank must call it alike.

    The first rank's `tensor` counts, as in `load_full_state_dict`; other ranks may pass None. A parameter and its
    master follow each other: the parameter is the master, rounded. A gradient counts in the next norm and step.

    Args:
        model: a sharded model or a part of it.
        name: the parameter's torch name (any of them, where tied).
        tensor: the parameter's shape (optimizer state: its own); any dtype, cast to that of what it replaces.
        optimizer: needed for masters and optimizer state.
        what: as for `get_full`.

    Raises:
        ZeroConfigError: as for `get_full`, or a wrong shape; on every rank, before anything has changed.
        ZeroStateError: no backward has come since gradients were zeroed, or there is no state yet; likewise.

    Bytes per rank: the tensor. On the wire: the tensor to every rank.
    """
    request = agree("set_full", model, name, what, optimizer, tensor)
    mine = _held(request)
    known = _any_of(_tell(request, mine))
    if request.given_shape != known.shape:
        given = "None" if request.given_shape is None else request.given_shape
        raise ZeroConfigError(f"{request}: expected shape {known.shape} from the first rank, got {given}")
    wire = request.state.everyone
    full = torch.empty(known.shape, dtype=known.dtype, device=wire.device)
    if wire.group.rank() == 0:
        assert tensor is not None
        full.copy_(tensor)
    wire.broadcast(f"new '{what}' of '{name}'", full)
    _write(request, mine, full.view(-1))


@dataclass(frozen=True)
class _Extent:
    """Which elements of a tensor a rank holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    numel: int

    @property
    def is_all(self) -> bool:
        return self.numel == math.prod(self.shape)


# -- what ranks hold ------------------------------------------------------------------------------------------


def _held(request: Request) -> Shard | None:
    """This rank's part, in live memory but for cast parameters and numbers; None if it knows of none."""
    unit, slot, part = request.unit, request.slot, request.part
    if request.what == "param":
        if unit.approximate or unit.stage == 3:
            unit.take_edits()
        else:
            return Shard(slot.shape, unit.dtype, (0,), unit.full[slot.offset : slot.stop])
        flat = unit.master if unit.shard is None else unit.shard
        flat = unit.values() if flat is None else flat
    elif request.what == "grad":
        request.state.reducer.finish()
        flat = request.lane.shard.value
    elif request.what == "master":
        unit.take_edits()
        flat = unit.master
    else:
        return _held_state(request.holder, request.what)
    if flat is None:
        return None
    local = flat[:0] if part is None else flat[part.start : part.stop]
    if request.what == "param":
        local = local.to(unit.dtype)
    return Shard(slot.shape, local.dtype, (0 if part is None else part.param_start,), local)


def _held_state(holder: StateHolder | None, key: str) -> Shard | None:
    if holder is None or key not in holder.state:
        return None
    if not holder.is_number(key):
        return holder.shard(key)
    number = holder.state[key]
    value = torch.as_tensor(number, dtype=torch.float64 if isinstance(number, float) else None).detach()
    return Shard((), value.dtype, (0,), value.reshape(1))


def _tell(request: Request, mine: Shard | None) -> list[_Extent | None]:
    """Every rank's extent; refuses, on every rank, what is not there; collective."""
    extent = None
    if mine is not None:
        dtype = str(mine.dtype).removeprefix("torch.")
        extent = [mine.global_shape, dtype, mine.offsets[0], mine.local.numel()]
    if request.what == "grad":
        used, keys = request.index in request.lane.bucket.used, []
    else:
        used, keys = True, [] if request.holder is None else sorted(map(str, request.holder.state))
    told = request.state.wire.gather_json(f"extents for {request}", [extent, used, keys])
    absent = not any(extent for extent, _, _ in told)
    if request.what == "grad" and (absent or (request.call == "get_full" and not any(u for _, u, _ in told))):
        raise ZeroStateError(
            f"{request}: there is no gradient; no backward has used it since gradients were zeroed"
        )
    if absent:
        _refuse_key(request, {key for _, _, keys in told for key in keys})
    return [
        None if extent is None else _Extent(tuple(extent[0]), getattr(torch, extent[1]), *extent[2:])
        for extent, _, _ in told
    ]


def _refuse_key(request: Request, keys: set[str]) -> NoReturn:
    if not keys:
        raise ZeroStateError(f"{request}: the optimizer has no state of it yet; the first step makes it")
    raise ZeroConfigError(
        f"{request}: the optimizer's state has no '{request.what}'; "
        + nearest(request.what, {"param", "grad", "master", *keys})
    )


def _any_of(extents: Sequence[_Extent | None]) -> _Extent:
    return next(extent for extent in extents if extent is not None)


# -- moving values --------------------------------------------------------------------------------------------


def _assemble(request: Request, mine: Shard | None, extents: Sequence[_Extent | None]) -> torch.Tensor:
    """The whole tensor: from the first rank that holds all of it, else from every rank that holds a part."""
    wire, known = request.state.wire, _any_of(extents)
    full = torch.empty(math.prod(known.shape), dtype=known.dtype, device=wire.device)
    complete = [extent is not None and extent.is_all for extent in extents]
    local = full[:0] if mine is None else mine.local.to(wire.device)
    if all(complete):
        return full.copy_(local).view(known.shape)
    sources = {complete.index(True)} if any(complete) else set(range(len(extents)))
    received = [
        full[extent.start : extent.start + extent.numel] if extent and rank in sources else full[:0]
        for rank, extent in enumerate(extents)
    ]
    own = received[wire.group.rank()]
    sent = own.copy_(local) if own.numel() else own
    wire.swap(f"parts for {request}", [sent] * len(extents), received).wait()
    return full.view(known.shape)


def _write(request: Request, mine: Shard | None, full: torch.Tensor) -> None:
    """Put this rank's part of `full` in its place."""
    if request.what in ("param", "master"):
        _write_values(request, full)
        return
    if request.what == "grad":
        request.lane.bucket.used.add(request.index)
        request.state.reducer.generation += 1
        request.lane.shard.version += 1
    elif request.holder is not None and mine is not None and request.holder.is_number(request.what):
        old, new = request.holder.state[request.what], full.item()
        request.holder.state[request.what] = (
            old.fill_(new) if isinstance(old, torch.Tensor) else type(old)(new)
        )
    if mine is not None:
        mine.local.copy_(full[mine.offsets[0] : mine.offsets[0] + mine.local.numel()])


def _write_values(request: Request, full: torch.Tensor) -> None:
    """A parameter and its master: both have the new value, each in its own dtype."""
    unit, slot, part = request.unit, request.slot, request.part
    unit.take_edits()
    unit.num_edits += 1
    if unit.stage < 3 and not unit.approximate:
        unit.full[slot.offset : slot.stop].copy_(full)
    if part is not None:
        unit.write(part, full[part.param_start : part.param_start + part.numel])
    if unit.stage == 3:
        assert request.state.gatherer is not None
        request.state.gatherer.refresh(unit)
    elif unit.approximate:
        show(unit, request.state.wire).wait()
