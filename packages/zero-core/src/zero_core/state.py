"""How a sharded model describes itself to whoever saves it: `name -> (global shape, dtype, this rank's slice)`.

In: a sharded model and its optimizer. Out: `Shard`s, whose `local` is a contiguous range of the flattened (row-major)
tensor; and back from tensors of the same ranges. A saver needs to know nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .api import sharded
from .collectives import Wire
from .errors import ZeroConfigError
from .layout import LocalSlot
from .optimizer import ShardedOptimizer
from .publish import show
from .steppers import ShardSlot


@dataclass(frozen=True)
class Shard:
    """One rank's part of a logical tensor.

    Attributes:
        global_shape: shape of the whole tensor.
        dtype: its dtype.
        offsets: `(start,)`: the first element of the part, in the flattened tensor.
        local: the part, 1-D.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    local: torch.Tensor


def sharded_state(model: nn.Module, optimizer: ShardedOptimizer | None = None) -> dict[str, Shard]:
    """Describe parameters, persistent buffers and optimizer state; no communication.

    Parameters go by their torch name (the first, where tied), optimizer state by `optimizer.<name>.<key>`, with
    `master` among the keys where masters are separate. A rank lists the tensors that it holds a part of; what is
    replicated (buffers; everything at stage 0) is whole on every rank. What a `local` holds is live memory to be read,
    but for parameters beside a separate master at stage 3, which are cast for the occasion (2P/N bytes while they
    last). State of an optimizer that steps whole tensors is listed whole by the parameter's owner (at stage 0 by all),
    under its own shape. `load_sharded_state` is the way back.
    Extra state of modules (`get_extra_state`) is not among it; `full_state_dict` has it.
    """
    units = sharded(model).units
    if optimizer is not None:  # masters say what was written to parameters, too
        optimizer.settle()
        optimizer.take_edits()
    return _describe(model, optimizer, [unit.values() for unit in units])


def _describe(
    model: nn.Module, optimizer: ShardedOptimizer | None, values: list[torch.Tensor]
) -> dict[str, Shard]:
    """`sharded_state`, with each unit's part of the parameters in `values`."""
    state = sharded(model)
    if optimizer is not None:
        optimizer.settle()
    found: dict[str, Shard] = {}
    for unit, flat in zip(state.units, values, strict=True):
        for part in unit.local_slots:
            local = flat[part.start : part.stop]
            found[part.slot.name] = Shard(part.slot.shape, local.dtype, (part.param_start,), local)
        for slot in unit.layout.slots:
            if slot.numel == 0:
                found[slot.name] = Shard(slot.shape, flat.dtype, (0,), flat[:0])
    for prefix, module in state.model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = f"{prefix}.{name}" if prefix else name
                found[full] = Shard(tuple(buffer.shape), buffer.dtype, (0,), buffer.detach().view(-1))
    return found | dict(_optimizer_tensors(optimizer))


@torch.no_grad()
def load_sharded_state(
    model: nn.Module,
    optimizer: ShardedOptimizer | None,
    tensors: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
) -> None:
    """Take over values for the very ranges that `sharded_state` describes; every rank calls it.

    Optimizer state that does not exist yet (before the first step) is created; that of whole tensors in the shape
    in which it is given, or in the parameter's where it has as many elements. Masters that are not given are taken
    from the parameters.

    Raises:
        ZeroConfigError: on some rank a name is missing or unexpected (`strict`), or a range has another size; on
            every rank, before anything has changed.
    """
    with optimizer.being_replaced() if strict and optimizer is not None else nullcontext():
        _load_sharded_state(model, optimizer, tensors, strict=strict)


def _load_sharded_state(
    model: nn.Module, optimizer: ShardedOptimizer | None, tensors: Mapping[str, torch.Tensor], *, strict: bool
) -> None:
    state = sharded(model)
    state.reducer.assemble()
    for unit in state.units:
        unit.settle()
        unit.forget_prefetched()
    values = [unit.values() for unit in state.units]
    described = _describe(model, optimizer, values)
    fresh = _fresh(optimizer, tensors.keys() - described.keys())
    problems = [f"unexpected '{name}'" for name in tensors.keys() - described.keys() - fresh.keys() if strict]
    if strict:
        problems += [f"missing '{name}'" for name in described.keys() - tensors.keys()]
    problems += _wrong_sizes(described, fresh, tensors)
    _refuse("load_sharded_state", _of_all_ranks(state.everyone, problems))
    of_optimizer = {name for name in described if name.startswith("optimizer.")}
    _copy_in(described, tensors, described.keys() - of_optimizer)
    for unit, flat in zip(state.units, values, strict=True):
        unit.set_values(flat, keep_unchanged=not strict, with_state=optimizer is not None)
    _copy_in(described, tensors, of_optimizer)  # last, since masters say more than the parameters
    for unit in state.units:
        if unit.stage == 3:
            assert state.gatherer is not None
            state.gatherer.refresh(unit)
        elif unit.stage > 0:
            show(unit, state.wire).wait()
    if optimizer is not None:
        _make(optimizer, fresh, tensors)


@torch.no_grad()
def load_optimizer_state(optimizer: ShardedOptimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take over a part of what `load_sharded_state` takes of the optimizer; no communication.

    For state that is too large to be given at once. `load_sharded_state` comes first, with the parameters.

    Raises:
        ZeroConfigError: a name is none of this optimizer's, or a range has another size; nothing was changed.
    """
    described = dict(_optimizer_tensors(optimizer))
    fresh = _fresh(optimizer, tensors.keys() - described.keys())
    problems = [f"unexpected '{name}'" for name in tensors.keys() - described.keys() - fresh.keys()]
    _refuse("load_optimizer_state", problems + _wrong_sizes(described, fresh, tensors))
    _copy_in(described, tensors, described.keys())
    _make(optimizer, fresh, tensors)


def _fresh(optimizer: ShardedOptimizer | None, names: Collection[str]) -> dict[str, tuple[StateHolder, str]]:
    """Whose state it would be, and under which key, of names that are not described: there is none yet."""
    known = {f"optimizer.{holder.name}.": holder for holder in state_holders(optimizer)}
    parted = {name: name.rpartition(".") for name in names}
    return {
        name: (known[f"{prefix}."], key) for name, (prefix, _, key) in parted.items() if f"{prefix}." in known
    }


def _wrong_sizes(
    described: Mapping[str, Shard],
    fresh: Mapping[str, tuple[StateHolder, str]],
    tensors: Mapping[str, torch.Tensor],
) -> list[str]:
    sizes = {name: shard.local.numel() for name, shard in described.items()}
    sizes |= {name: holder.place.numel for name, (holder, _) in fresh.items() if holder.place is not None}
    return [
        f"'{name}': expected {size} elements, got {tensors[name].numel()}"
        for name, size in sizes.items()
        if name in tensors and tensors[name].numel() != size
    ]


def _of_all_ranks(wire: Wire, problems: list[str]) -> list[str]:
    """The problems of every rank, so that all of them refuse or none; collective."""
    told = wire.gather_json("check of the sharded state", sorted(problems)[:8])
    whose: dict[str, list[str]] = {}
    for rank, found in enumerate(told):
        for problem in found:
            whose.setdefault(problem, []).append(str(rank))
    return [f"{problem} (rank {', '.join(ranks)} of {len(told)})" for problem, ranks in whose.items()]


def _refuse(call: str, problems: list[str]) -> None:
    if problems:
        raise ZeroConfigError(f"{call}: " + "; ".join(sorted(problems)[:8]))


def _make(
    optimizer: ShardedOptimizer,
    fresh: Mapping[str, tuple[StateHolder, str]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """State that does not exist yet."""
    for name, (holder, key) in fresh.items():
        room = None if holder.slot is None else optimizer.room_for_state(holder.slot, key)
        taken = holder.fit(tensors[name]) if room is None else room.copy_(tensors[name].reshape(-1))
        optimizer.inner.state[holder.param][key] = taken


def _copy_in(
    described: dict[str, Shard], tensors: Mapping[str, torch.Tensor], names: Collection[str]
) -> None:
    for name in tensors.keys() & names:
        described[name].local.copy_(tensors[name].reshape(-1))


def optimizer_scalars(optimizer: ShardedOptimizer) -> dict[str, dict[str, float]]:
    """The optimizer's per-parameter numbers (step counts and the like), for the parameters this rank has a part of.

    An integer of Python's stays one, and comes back as one; the others are floats, and come back as scalar tensors.
    """
    return {
        holder.name: {
            key: value if isinstance(value, int) else float(value)
            for key, value in holder.state.items()
            if holder.is_number(key)
        }
        for holder in state_holders(optimizer)
    }


def forget_optimizer_state(optimizer: ShardedOptimizer, names: Collection[str]) -> None:
    """Have the optimizer begin anew with these parameters, on this rank's parts of them."""
    for holder in state_holders(optimizer):
        if holder.name in names:
            optimizer.inner.state.pop(holder.param, None)


def load_optimizer_scalars(optimizer: ShardedOptimizer, scalars: Mapping[str, Mapping[str, Any]]) -> None:
    """Take over what `optimizer_scalars` gave, of this or any other rank; names of other ranks' parts are ignored."""
    for holder in state_holders(optimizer):
        for key, value in scalars.get(holder.name, {}).items():
            number = value if isinstance(value, int) else torch.tensor(float(value))
            optimizer.inner.state[holder.param][key] = number


def _slots(optimizer: ShardedOptimizer | None) -> Iterator[ShardSlot]:
    if optimizer is not None:
        for slots in optimizer.slots.values():
            yield from slots


@dataclass(frozen=True)
class StateHolder:
    """A parameter of the torch optimizer on this rank, with its state.

    Attributes:
        slot: the part of one of the model's parameters that it is; None for a whole one.
    """

    name: str
    param: nn.Parameter
    slot: ShardSlot | None
    state: dict[str, Any]

    @property
    def place(self) -> LocalSlot | None:
        """Where that part is."""
        return None if self.slot is None else self.slot.place

    def is_number(self, key: str) -> bool:
        """Whether a state entry is a number, such as a step count; a scalar parameter's own moments are tensors."""
        value = self.state[key]
        if isinstance(value, torch.Tensor):
            return value.dim() == 0 and (key == "step" or self.param.dim() > 0)
        return isinstance(value, (int, float))

    def shard(self, key: str) -> Shard:
        """Describe a tensor of the state; `local` shares its memory."""
        if not self.state[key].is_contiguous():
            self.state[key] = self.state[key].contiguous()
        value: torch.Tensor = self.state[key]
        shape, start = tuple(value.shape), 0
        if self.place is not None:
            shape, start = self.place.slot.shape, self.place.param_start
        return Shard(shape, value.dtype, (start,), value.view(-1))

    def fit(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that is given for new state, in the shape that the optimizer expects."""
        of_param = self.place is not None or tensor.numel() == self.param.numel()
        return (tensor.reshape(self.param.shape) if of_param else tensor).to(self.param.device, copy=True)


def state_holders(optimizer: ShardedOptimizer | None) -> Iterator[StateHolder]:
    """What the torch optimizer keeps state for on this rank."""
    if optimizer is None:
        return
    optimizer.settle()
    state = optimizer.inner.state
    if optimizer.whole is None:
        for slot in _slots(optimizer):
            yield StateHolder(slot.name, slot.master, slot, state.get(slot.master, {}))
    else:
        for owned in optimizer.whole:
            yield StateHolder(owned.name, owned.master, None, state.get(owned.master, {}))


def _optimizer_tensors(optimizer: ShardedOptimizer | None) -> Iterator[tuple[str, Shard]]:
    """Every state tensor that this rank has (a part of), masters first where they are separate from the parameters."""
    for slot in _slots(optimizer):
        assert optimizer is not None
        if optimizer.unit_of(slot).has_separate_master:
            place, local = slot.place, slot.master.detach()
            yield (
                f"optimizer.{slot.name}.master",
                Shard(place.slot.shape, local.dtype, (place.param_start,), local),
            )
    for holder in state_holders(optimizer):
        for key, value in holder.state.items():
            if isinstance(value, torch.Tensor) and not holder.is_number(key):
                yield f"optimizer.{holder.name}.{key}", holder.shard(key)
