"""An optimizer's state, saved and loaded: on the same ranks, on others, and by whoever saves ranges of tensors.

In: what `bucketed` allocated. Out: state dicts of this rank, and `name -> Shard` for any number of ranks (`state` says
in which form); and back. Next: `base` steps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from zero_core import Shard

from ..errors import CompressStateError
from . import exact, state
from .bucket import Bucket
from .bucketed import BucketedOptimizer, Elsewhere
from .kinds import Held


class SavedOptimizer(BucketedOptimizer):
    """A `BucketedOptimizer` that can be saved in any phase."""

    @abstractmethod
    def _set_progress(self, progress: Mapping[str, Any]) -> None:
        """Go on from `progress()`."""

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, which is for this rank alone: see `merge_states` for any other number of ranks.

        As torch's: "state" by the numbers that "param_groups" have of the parameters; and "compression": rank, world,
        names by these numbers, how tensors are held, and how far training has come. Tensors are live memory.
        """
        self._plan()
        self._take_edits()
        groups = super().state_dict()["param_groups"]
        keys = self._keyed(self.progress())
        world, rank = self.group.size(), self.group.rank()
        held = {key: how.value for _, each in keys for key, how in each.items()}
        all_params = [param for group in self.param_groups for param in group["params"]]
        number_of = {id(param): number for number, param in enumerate(all_params)}
        numbers = [number_of[id(param)] for param in self._params]
        names = dict(zip(numbers, self.names, strict=True))
        where = {"rank": rank, "world": world, "names": names, "held": held}
        return {
            "state": state.to_plain(keys, world, rank, numbers),
            "param_groups": groups,
            "compression": {**where, "progress": self.progress()},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()` of this rank of as many ranks, or from what `merge_states` made of any.

        Parameters are the caller's to load, but for those that a rank has stepped alone (0/1 Adam between
        synchronizations), which are written.

        Raises:
            CompressStateError: the state is of another rank, number of ranks, optimizer or model; nothing was changed.
            ValueError: other numbers of groups or parameters.
        """
        self._plan()
        given = state_dict.get("compression")
        if given is None:
            raise CompressStateError(
                f"load_state_dict: expected the state of {type(self).__name__}, got one without 'compression': that of "
                "an optimizer that sends nothing itself; start with new state"
            )
        self._check_kind(given["progress"])
        own = (self.group.rank(), self.group.size())
        if given["rank"] is not None and (given["rank"], given["world"]) != own:
            raise CompressStateError(
                f"load_state_dict: expected the state of rank {own[0]} of {own[1]}, got that of rank {given['rank']} "
                f"of {given['world']}; save each rank's, and load merge_states([...]) on another number of ranks"
            )
        by_name = {given["names"][number]: values for number, values in state_dict["state"].items()}
        found = [
            (place, state.find_plain(place, by_name))
            for place in self._places(
                given["progress"], {n for n, known in by_name.items() if "master" in known}
            )
        ]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = Elsewhere(type(self).__name__)
        self._take_over(given["progress"], by_name)
        for place, values in found:
            place.local().copy_(values)
        self._loaded()

    def scalars(self) -> dict[str, Any]:
        """What `sharded_state` leaves out: progress, and numbers of each parameter; plain values, the same on all."""
        self._plan()
        return {
            "progress": self.progress(),
            "world": self.group.size(),
            "masters": [
                slot.name
                for bucket in self._buckets
                for slot in bucket.plan.slots
                if bucket.master is not None
            ],
            "numbers": {
                slot.name: {key: numbers[slot.position] for key, numbers in bucket.numbers.items()}
                for bucket in self._buckets
                for slot in bucket.plan.slots
            },
        }

    def sharded_state(self) -> dict[str, Shard]:
        """This rank's state as ranges of tensors, for whoever saves those: `name -> Shard`, see `optimizers.state`."""
        self._plan()
        self._take_edits()
        world, rank = self.group.size(), self.group.rank()
        return dict(
            state.described(place, rank, place.local())
            for bucket, keys in self._keyed(self.progress())
            for place in state.places(bucket, keys, world, rank)
        )

    def sharded_room(self, scalars: Mapping[str, Any]) -> dict[str, Shard]:
        """New memory for what this rank needs of a state that was saved with `scalars`, on any number of ranks.

        Raises:
            CompressStateError: they are another optimizer's.
        """
        self._plan()
        self._check_kind(scalars["progress"])
        world, rank, old = self.group.size(), self.group.rank(), int(scalars["world"])
        room: dict[str, Shard] = {}
        for place in self._places(scalars["progress"], scalars["masters"]):
            if place.held is Held.OWN and old != world:
                room |= state.own_room(place, old, world, rank)
            else:
                name, shard = state.described(place, rank, torch.empty(place.stop - place.start))
                room[name] = shard
        return room

    @torch.no_grad()
    def load_sharded_state(self, scalars: Mapping[str, Any], room: Mapping[str, Shard]) -> None:
        """Take over what was read into `sharded_room(scalars)`; every rank calls it.

        What each of another number of ranks held of its own, all get the mean of.
        """
        wire = self._wire()
        self._take_over(scalars["progress"], scalars["numbers"])
        world, rank, old = self.group.size(), self.group.rank(), int(scalars["world"])
        for place in self._places(scalars["progress"], scalars["masters"]):
            if place.held is Held.OWN and old != world:
                rows = [room[f"{place.name}_{each}"].local for each in range(old)]
                place.local().copy_(exact.gather_mean(rows, place.stop - place.start, place.name, wire))
            else:
                name, _ = state.described(place, rank, place.local())
                place.local().copy_(room[name].local)
        self._loaded()

    def _take_over(self, progress: Mapping[str, Any], numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Progress and numbers, and the tensors that belong to them, still without values."""
        self._set_progress(progress)
        self.num_steps = int(progress["num_steps"])
        for bucket in self._buckets:
            self._allocate(bucket, progress)
            bucket.take_values()  # where no master was saved, fp32 parameters are theirs
            for slot in bucket.plan.slots:
                known = numbers.get(slot.name, {})
                for key, row in bucket.numbers.items():
                    row[slot.position] = known.get(key, row[slot.position])

    def _loaded(self) -> None:
        """State has been loaded; parameters follow where they must."""
        self._note()

    def _check_kind(self, progress: Mapping[str, Any]) -> None:
        if progress["kind"] != type(self).__name__:
            raise CompressStateError(
                f"expected the state of {type(self).__name__}, got that of {progress['kind']}; build that optimizer"
            )

    def _places(self, progress: Mapping[str, Any], masters: Collection[str]) -> list[state.Place]:
        """This rank's pieces of a saved state; `masters`: the names of parameters that have one there.

        Masters of fp32 parameters that were saved without (by another `shard`) are no pieces: parameters say as much.
        """
        world, rank = self.group.size(), self.group.rank()
        return [
            place
            for bucket, keys in self._keyed(progress)
            for place in state.places(bucket, keys, world, rank)
            if place.key != "master" or bucket.dtype != torch.float32 or place.parameter in masters
        ]

    def _keyed(self, progress: Mapping[str, Any]) -> list[tuple[Bucket, dict[str, Held]]]:
        return [(bucket, self.keys(progress, low=bucket.dtype != torch.float32)) for bucket in self._buckets]
