"""Full values for whoever needs them: in place for a block, as a stream unit by unit, or as a state dict.

In: a sharded model, or any part of it. Out: true values under plain torch names; and back from them. At most one
unit beyond the shards is whole at a time, except inside `materialized` and in a dict that holds everything.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .api import Sharded, sharded
from .errors import ZeroConfigError, ZeroStateError
from .flat_unit import FlatUnit
from .publish import show
from .tiles import Tile, Tiled
from .tiling import Untiled


@contextmanager
def materialized(module: nn.Module, *, write: bool = False) -> Iterator[nn.Module]:
    """Have the parameters of `module` (a sharded model or any part of it) whole inside the block.

    Every rank must enter and leave it together.

    Args:
        module: what to make whole.
        write: keep what the block changes: each rank's own part of each parameter counts, so a block that does the
            same on every rank changes the same everywhere; masters follow.

    Raises:
        ZeroStateError: a parameter was changed without `write`.
    """
    state = sharded(module)
    units = state.units_of(module)
    with _whole(state, units):
        before = [unit.writes() for unit in units]
        yield module
        changed = [
            slot.name
            for unit, then in zip(units, before, strict=True)
            for slot, now, earlier in zip(unit.layout.slots, unit.writes(), then, strict=True)
            if now != earlier
        ]
        if changed and not write:
            raise ZeroStateError(
                f"materialized: {', '.join(changed[:4])} changed inside the block, and stages would differ in whether "
                "that lasts; pass write=True to keep changes"
            )
        if write:
            for unit in units:
                _take_over(state, unit, keep_unchanged=True)


@contextmanager
def _whole(state: Sharded, units: list[FlatUnit]) -> Iterator[None]:
    """Have units whole inside the block, with the shards' own values; every rank enters it.

    Where units are computed with as approximations, what the block writes is gone after it, unless it was taken over.
    """
    shown = [unit for unit in units if unit.approximate and unit.stage < 3]
    with state.showing(), state.gatherer.hold(units) if state.gatherer else nullcontext():
        for unit in shown:
            if not unit.num_exact_uses:
                unit.settle()
                unit.take_edits()
            unit.num_exact_uses += 1
            if unit.num_exact_uses == 1:
                show(unit, state.wire).wait()
        try:
            yield
        finally:
            for unit in shown:
                unit.num_exact_uses -= 1
                if not unit.num_exact_uses:
                    show(unit, state.wire).wait()
                    unit.forget_edits()


def exact_values(state: Sharded) -> list[tuple[FlatUnit, list[torch.Tensor]]]:
    """Copies of the parameters of each unit that does not show its shards' own values; collective."""
    found = []
    for unit in state.units:
        unit.settle()
        if unit.stage == 3 or unit.approximate:
            with _whole(state, [unit]):
                found.append((unit, [param.detach().clone() for param in unit.params]))
    return found


def stream_full(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer under its torch name, whole, one unit (or tiled weight) at a time.

    Every rank must run it to the end. A tensor's values last until the next one is asked for; tied names follow each
    other with the same tensor.
    """
    for names, tensor in _stream(model):
        for name in names:
            yield name, tensor


def _stream(model: nn.Module) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Each distinct parameter and persistent buffer with all its names, whole, one unit at a time."""
    state = sharded(model)
    model = state.part(model)
    untiled = Untiled(model)
    wanted = {id(p) for p in model.parameters()}
    for unit in state.units_of(model):
        with _whole(state, [unit]):
            for slot, param in zip(unit.layout.slots, unit.params, strict=True):
                if id(param) in wanted:
                    yield from untiled.join(local_names(state, model, slot.names), param.detach())
    for name, buffer in _persistent_buffers(model).items():
        yield [name], buffer


def full_specs(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of everything that `stream_full` yields, in the order of the model's state dict; local."""
    model = sharded(model).part(model)
    found = {}
    for name, shape in _expected(model, "get_extra_state").items():
        if shape is not None:
            owner, leaf = _owner(model, name), name.rpartition(".")[2]
            held = {**owner._buffers, **owner._parameters}.get(leaf)
            held = next(owner.parameters()) if held is None else held  # a tiled weight is of its tiles' dtype
            found[name] = (held.dtype, shape)
    return found


def full_state_dict(
    model: nn.Module, *, rank0_only: bool = False, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The state dict of the unsharded model: plain names, shapes and the parameters' dtypes.

    Every rank must call it. Buffers and extra state (`get_extra_state`) are the rank's own. Hooks that modules have on
    `state_dict` and `load_state_dict` are not run.

    Args:
        model: a sharded model or a part of it.
        rank0_only: other ranks get an empty dict and hold nothing.
        device: where the copies go.

    Bytes per rank: the whole model on `device` where a dict is returned, plus one unit.
    """
    state = sharded(model)
    model = state.part(model)
    keep = not rank0_only or state.everyone.group.rank() == 0
    found: dict[str, Any] = {}
    for names, tensor in _stream(model):
        if keep:
            found |= dict.fromkeys(names, tensor.to(device, copy=True))  # tied names share one copy
    expected = _expected(model, "get_extra_state")
    for name in _extra_states(expected) if keep else ():
        found[name] = _owner(model, name).get_extra_state()
    return {name: found[name] for name in expected if name in found}


def load_full_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any] | None, *, strict: bool = True
) -> None:
    """Load plain torch names and shapes; the first rank's dict counts, other ranks may pass None.

    Every rank must call it. Values travel one unit at a time and are cast to the parameters' dtypes; masters follow.
    Extra state (`set_extra_state`) travels pickled, its tensors on the CPU.

    Raises:
        ZeroConfigError: names are missing or unexpected (`strict`), a shape is not the parameter's, or extra state
            cannot be pickled; on every rank, before anything has changed.
    """
    state = sharded(model)
    model = state.part(model)
    untiled = Untiled(model)
    wire, reads = state.everyone, state.everyone.group.rank() == 0
    state.reducer.assemble()
    expected = _expected(model, "set_extra_state")
    problems: list[str] = []
    extra = b""
    if reads and state_dict is None:
        problems = ["the first rank must pass the state dict, got None"]
    elif reads:
        assert state_dict is not None
        problems = _mismatch(expected, state_dict, strict=strict)
        given_extra = {name: state_dict[name] for name in _extra_states(expected) & state_dict.keys()}
        try:
            extra = _packed(given_extra)
        except Exception as error:  # whatever a value's own pickling raises
            problems.append(f"{', '.join(sorted(given_extra))} cannot be sent to the other ranks: {error}")
    problems = json.loads(wire.broadcast_text("check of the state dict", json.dumps(problems)))
    if problems:
        raise ZeroConfigError("load_full_state_dict: " + "; ".join(problems))
    given = json.loads(wire.broadcast_text("names of the state dict", json.dumps(sorted(state_dict or {}))))
    present = set(given)
    with torch.no_grad():
        for unit in state.units_of(model):
            with _whole(state, [unit]):
                for slot, param in zip(unit.layout.slots, unit.params, strict=True):
                    names = [n for n in local_names(state, model, slot.names) if untiled.name(n) in present]
                    if reads and names:
                        assert state_dict is not None
                        param.copy_(untiled.part(names[0], state_dict))
                wire.broadcast(unit.label, unit.full)
                _take_over(state, unit)
        for name, buffer in _persistent_buffers(model).items():
            if name in present:
                if reads and state_dict is not None:
                    buffer.copy_(state_dict[name])
                wire.broadcast(f"buffer '{name}'", buffer)
    if _extra_states(expected) & present:
        for name, value in _unpacked(wire.broadcast_bytes("extra state", extra)).items():
            _owner(model, name).set_extra_state(value)


@torch.no_grad()
def _take_over(state: Sharded, unit: FlatUnit, *, keep_unchanged: bool = False) -> None:
    """The full buffer has new values: each rank keeps its own slice of them, and all agree again."""
    if unit.stage == 0:
        state.wire.gather(unit.label, unit.own_slice(), unit.full).wait()
    unit.set_values(unit.full[slice(*unit.local)], keep_unchanged=keep_unchanged)
    if 0 < unit.stage < 3 and not unit.approximate:  # else `_whole` does, when the block is over
        show(unit, state.wire).wait()


def _expected(model: nn.Module, accessor: str) -> dict[str, tuple[int, ...] | None]:
    """Names and shapes of `model.state_dict()`, in its order, without touching values; None for extra state.

    Args:
        model: a sharded model or a part of it.
        accessor: the method by which a module has extra state, `get_extra_state` or `set_extra_state`.
    """
    expected: dict[str, tuple[int, ...] | None] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, Tile):
            continue
        if isinstance(module, Tiled):
            expected[f"{dot}weight"] = module.grid.shape
        expected.update({dot + n: tuple(p.shape) for n, p in module._parameters.items() if p is not None})
        expected.update(
            {
                dot + n: tuple(b.shape)
                for n, b in module._buffers.items()
                if b is not None and n not in module._non_persistent_buffers_set
            }
        )
        if getattr(type(module), accessor) is not getattr(nn.Module, accessor):
            expected[f"{dot}_extra_state"] = None
    return expected


def _extra_states(expected: Mapping[str, tuple[int, ...] | None]) -> set[str]:
    return {name for name, shape in expected.items() if shape is None}


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that an entry of the state dict belongs to."""
    return model.get_submodule(name.rpartition(".")[0])


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(packed: bytes) -> Any:
    return torch.load(
        io.BytesIO(packed), map_location="cpu", weights_only=False
    )  # from a rank of this very job


def _persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    expected = _expected(model, "get_extra_state")
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in expected}


def local_names(state: Sharded, model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Names under `model`, which may be a part of the sharded model."""
    if model is state.model:
        return list(names)
    prefixes = [name for name, module in state.model.named_modules(remove_duplicate=False) if module is model]
    return [name[len(p) + 1 :] for name in names for p in prefixes if name.startswith(p + ".")]


def _mismatch(
    expected: dict[str, tuple[int, ...] | None], given: Mapping[str, Any], *, strict: bool
) -> list[str]:
    problems = []
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if strict and missing:
        problems.append(
            f"missing: {', '.join(missing[:8])}" + (f" and {len(missing) - 8} more" if missing[8:] else "")
        )
    if strict and unexpected:
        more = f" and {len(unexpected) - 8} more" if unexpected[8:] else ""
        problems.append(f"unexpected: {', '.join(unexpected[:8])}{more}")
    return problems + [
        f"'{name}': expected shape {expected[name]}, got {tuple(given[name].shape)}"
        for name in sorted(expected.keys() & given.keys() - _extra_states(expected))
        if tuple(given[name].shape) != expected[name]
    ]
