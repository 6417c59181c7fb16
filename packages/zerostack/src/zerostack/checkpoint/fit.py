"""What a checkpoint has, and what an engine needs of it. Pure: names, shapes and dtypes; nothing is read or changed.

In: a checkpoint's description and values, an engine's description of itself. Out: room for what is to be read and the
names it is stored under; or an error that says what does not fit. Next: `loading` reads into the room.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import zero_core as zero

from ..errors import CheckpointError
from .contents import Saved
from .names import MODEL, OPTIMIZER, is_master, is_state, parameter_of, some

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of what is in a checkpoint, by name."""

PART_BYTES = 512 << 20
"""Of optimizer state that is read at once where it rests in a store, on each rank."""


def wanted(
    stored: Stored, described: Mapping[str, zero.Shard], *, makes_state: bool, whole: Collection[str] | None
) -> tuple[dict[str, zero.Shard], dict[str, str]]:
    """Room for the ranges this rank needs, and where those are stored that have another name in the checkpoint.

    A parameter without a separate master takes the checkpoint's master, and a master that the checkpoint lacks is the
    parameter.

    Args:
        stored: What the checkpoint has.
        described: What this rank has.
        makes_state: Whether state that the checkpoint has and this rank has not made yet is wanted, too: it covers the
            same range as its parameter.
        whole: The parameters that this rank steps as a whole, for an optimizer that looks at whole ones; such state
            belongs to these alone then, in a shape of its own.
    """
    rooms = {
        name: _room(shard.global_shape, shard.dtype, shard.offsets[0], shard.local.numel())
        for name, shard in described.items()
    }
    sources: dict[str, str] = {}
    for name, (shape, dtype) in stored.items():
        if not name.startswith(OPTIMIZER) or name in rooms:
            continue
        parameter = parameter_of(name)
        own = rooms.get(MODEL + parameter)
        if is_master(name):
            if own is not None:
                sources[MODEL + parameter] = name
        elif makes_state and whole is not None and parameter in whole:
            rooms[name] = _room(shape, dtype, 0, torch.Size(shape).numel())
        elif makes_state and whole is None and own is not None:
            rooms[name] = _room(own.global_shape, dtype, own.offsets[0], own.local.numel())
    sources |= {name: MODEL + parameter_of(name) for name in rooms if is_master(name) and name not in stored}
    return rooms, sources


def _room(shape: tuple[int, ...], dtype: torch.dtype, start: int, numel: int) -> zero.Shard:
    """Without memory, which comes with reading."""
    return zero.Shard(shape, dtype, (start,), torch.empty(numel, dtype=dtype, device="meta"))


def in_parts(rooms: Mapping[str, zero.Shard]) -> list[dict[str, zero.Shard]]:
    """The optimizer's among them, in parts of at most `PART_BYTES`, or of one tensor that is larger."""
    parts: list[dict[str, zero.Shard]] = []
    nbytes = PART_BYTES
    for name in sorted(name for name in rooms if name.startswith(OPTIMIZER)):
        size = rooms[name].local.nbytes
        if nbytes + size > PART_BYTES:
            parts.append({})
            nbytes = 0
        parts[-1][name] = rooms[name]
        nbytes += size
    return parts


def without_state(stored: Stored, parameters: Collection[str]) -> set[str]:
    """Parameters that the checkpoint has, and no state of an optimizer of them: it had not moved them yet."""
    with_state = {parameter_of(name) for name in stored if is_state(name)}
    return {name for name in set(parameters) - with_state if MODEL + name in stored}


def check_names(
    path: str,
    stored: Stored,
    needed: Collection[str],
    *,
    known: Collection[str],
    optional: Collection[str],
    anew: Collection[str],
    states: bool,
) -> None:
    """Compare the checkpoint's names with those of all ranks.

    Args:
        path: For the message.
        stored: What the checkpoint has.
        needed: What any rank has room for.
        known: Names of the model that need no room, such as tied ones.
        optional: What the checkpoint was told to leave out.
        anew: Parameters whose state is made anew, since the checkpoint is from before it was.
        states: Whether the optimizer's state is to be loaded.

    Raises:
        CheckpointError: names are missing there, or are not the model's.
    """
    needed, known = set(needed), set(known)
    unexpected = [
        name
        for name in stored
        if name not in needed | known and not is_master(name) and (states or not is_state(name))
    ]
    missing = [
        name
        for name in sorted(needed)
        if name not in stored
        and not (is_master(name) and MODEL + parameter_of(name) in stored)
        and not (name.startswith(OPTIMIZER) and parameter_of(name) in anew)
        and name not in optional
    ]
    if unexpected or missing:
        raise CheckpointError(
            f"{path} does not fit the model: missing there: {some(missing)}; not in the model: "
            f"{some(unexpected)}; pass load_module_strict=False to load what both have"
        )


def check_optimizer(saved: Saved, own_type: str, num_groups: int) -> None:
    """Find out whether a state is of such an optimizer.

    Raises:
        CheckpointError: it is of another, or of other parameter groups.
    """
    if saved.optimizer_groups is not None and num_groups != len(saved.optimizer_groups):
        raise CheckpointError(
            f"the checkpoint has {len(saved.optimizer_groups)} parameter group(s), the optimizer {num_groups}"
        )
    if saved.optimizer_type is not None and own_type != saved.optimizer_type:
        raise CheckpointError(
            f"the checkpoint holds the state of {saved.optimizer_type}, the engine steps with {own_type}; pass "
            "load_optimizer_states=False to start the optimizer anew"
        )


def check_schedule(saved: Saved, own_type: str) -> None:
    """Find out whether a schedule's state is of such a schedule.

    Raises:
        CheckpointError: it is of another.
    """
    of_saved = (saved.lr_scheduler or {}).get("type")
    if of_saved not in {None, own_type}:
        raise CheckpointError(
            f"the checkpoint holds the state of a {of_saved}, the engine has a {own_type}; pass "
            "load_lr_scheduler_states=False to start the schedule anew"
        )
