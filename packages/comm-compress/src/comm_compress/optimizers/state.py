"""What an optimizer keeps, by parameter: described, saved, and loaded on the same ranks or on others.

In: buckets and how their tensors are held. Out: `name -> Shard` for whoever saves ranges of tensors, or a plain state
dict of this rank; and back. Names do not depend on buckets or ranks, so another number of ranks, or another size of
buckets, finds what it needs.

The form: `<parameter>.<key>`, with the parameter's shape. What all ranks hold alike is whole; what each holds a part of
(`server_error`; moments while they are sharded) is that range of the flattened parameter; what each holds its own of
(`worker_error`; 0/1 Adam's `drift` and `exp_avg` between synchronizations) is `<parameter>.<key>_<rank>`, whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from zero_core import Shard

from ..errors import CompressStateError
from .bucket import Bucket
from .kinds import Held
from .layout import parts_of

Keys = Mapping[str, Held]


@dataclass(frozen=True)
class Place:
    """Where a piece of state belongs: elements `[start, stop)` of a bucket's tensor `key`.

    Attributes:
        first: first element of the piece, in the flattened parameter `slot_index` of that bucket.
    """

    bucket: Bucket
    key: str
    held: Held
    position: int
    first: int
    start: int
    stop: int

    @property
    def parameter(self) -> str:
        """Its name."""
        return self.bucket.plan.slots[self.position].name

    @property
    def name(self) -> str:
        """`<parameter>.<key>`."""
        return f"{self.parameter}.{self.key}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's, in checkpoints."""
        return self.bucket.plan.slots[self.position].saved_shape

    def local(self) -> Tensor:
        """The memory itself."""
        return self.bucket.flat[self.key][self.start : self.stop]


def places(bucket: Bucket, keys: Keys, world: int, rank: int) -> list[Place]:
    """Every piece of a bucket's state that `rank` holds."""
    return [
        Place(bucket, key, held, part.slot.position, part.first, part.start, part.stop)
        for key, held in keys.items()
        for part in parts_of(bucket.plan, *held.span(bucket.plan.numel, world, rank))
    ]


def described(place: Place, rank: int, local: Tensor) -> tuple[str, Shard]:
    """A piece by the name and range under which it is saved."""
    suffix = f"_{rank}" if place.held is Held.OWN else ""
    return place.name + suffix, Shard(place.shape, torch.float32, (place.first,), local)


def own_room(place: Place, old_world: int, world: int, rank: int) -> dict[str, Shard]:
    """Room for this rank's equal part of what each of `old_world` ranks held of its own."""
    numel = place.stop - place.start
    start, stop = Held.PART.span(numel, world, rank)
    return {
        f"{place.name}_{old}": Shard(
            place.shape, torch.float32, (place.first + start,), torch.empty(stop - start)
        )
        for old in range(old_world)
    }


# -- plain state dicts ----------------------------------------------------------------------------------------


def to_plain(
    buckets: Sequence[tuple[Bucket, Keys]], world: int, rank: int, numbers_of: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """This rank's state by the numbers of the parameters.

    `numbers_of` has them by the parameters' indices: torch counts those that need no gradient, too. A piece that is all
    of its parameter has the parameter's shape; another is 1-D, with its first element's place in the flattened
    parameter under `<key>_start`. Other numbers are numbers.
    """
    state: dict[int, dict[str, Any]] = {}
    for bucket, keys in buckets:
        for slot in bucket.plan.slots:
            known: dict[str, Any] = {key: numbers[slot.position] for key, numbers in bucket.numbers.items()}
            state[numbers_of[slot.index]] = known
        for place in places(bucket, keys, world, rank):
            slot, local = bucket.plan.slots[place.position], place.local()
            known = state[numbers_of[slot.index]]
            if local.numel() == slot.numel:
                known[place.key] = local.view(slot.shape)
            else:
                known[place.key] = local
                known[f"{place.key}_start"] = place.first
    return state


def find_plain(place: Place, by_name: Mapping[str, Mapping[str, Any]]) -> Tensor:
    """The values of a place in a plain state, whose parameters are given by their names.

    Raises:
        CompressStateError: they are not there, or of another parameter.
    """
    slot = place.bucket.plan.slots[place.position]
    given = by_name.get(slot.name, {})
    values = given.get(place.key)
    if values is None:
        raise CompressStateError(
            f"load_state_dict: expected '{place.key}' of parameter '{slot.name}' ({slot.index}), got "
            f"{sorted(given) or 'nothing'}; the state is of another optimizer or model"
        )
    flat: Tensor = values.reshape(-1)
    numel, cut = place.stop - place.start, given.get(f"{place.key}_start")
    what = f"load_state_dict: '{place.key}' of parameter '{slot.name}' {slot.shape}"
    if flat.numel() > slot.numel or (cut is None and flat.numel() < slot.numel):
        raise CompressStateError(
            f"{what}: expected {slot.numel} elements, got {flat.numel()}; the state is of another model"
        )
    start = place.first - int(cut or 0)
    if start < 0 or start + numel > flat.numel():
        raise CompressStateError(
            f"{what}: expected elements {place.first} to {place.first + numel}, got {flat.numel()} from {cut}; it was "
            "saved with other buckets, another shard= or on another number of ranks: load what "
            "comm_compress.merge_states makes of all ranks' states"
        )
    return flat[start : start + numel]


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state dicts of all ranks of a run as one, which loads on any rank of any number of ranks.

    What ranks held a part of is put together; of what each held its own, all get the mean, so that what is owed on
    average (residuals), or has been stepped on average (0/1 Adam between synchronizations), stays.

    Args:
        states: `state_dict()` of every rank, in any order.

    Raises:
        CompressStateError: a rank is missing, or given twice.
    """
    by_rank = {state["compression"]["rank"]: state for state in states}
    worlds = {state["compression"]["world"] for state in states}
    if len(worlds) != 1 or sorted(by_rank) != list(range(*worlds)) or len(states) != len(by_rank):
        given = sorted(state["compression"]["rank"] for state in states)
        raise CompressStateError(
            f"merge_states: expected the state of every rank once, of one run, got ranks {given} of {sorted(worlds)}"
        )
    ordered = [by_rank[rank] for rank in sorted(by_rank)]
    first = ordered[0]
    merged: dict[int, dict[str, Any]] = {}
    for index in first["state"]:
        given = [state["state"][index] for state in ordered]
        keys = {key for each in given for key in each if not key.endswith("_start")}
        merged[index] = {key: _merged(key, given, first["compression"]["held"]) for key in sorted(keys)}
    return {
        "state": merged,
        "param_groups": first["param_groups"],
        "compression": {**first["compression"], "rank": None, "world": None},
    }


def _merged(key: str, given: Sequence[Mapping[str, Any]], held: Mapping[str, str]) -> Any:
    values = [(each.get(f"{key}_start", 0), each[key]) for each in given if key in each]
    if not isinstance(values[0][1], Tensor):
        return values[0][1]
    if held[key] == Held.OWN.value:
        return torch.stack([value for _, value in values]).to(torch.float64).mean(0).float()
    if held[key] == Held.WHOLE.value:
        return values[0][1]
    return torch.cat([value.reshape(-1) for _, value in sorted(values, key=lambda pair: pair[0])])
