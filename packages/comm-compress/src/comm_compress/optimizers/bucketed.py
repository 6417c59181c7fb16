"""Parameters in flat buckets, with everything that is kept for them: planned, allocated, saved and loaded.

In: parameter groups. Out: `Bucket`s whose tensors are those that a subclass names for its progress (`keys`); state
dicts of this rank, and ranges of tensors for any number of ranks. Next: `base` steps them.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from zero_core import PlainCollectives, Shard, Wire

from ..allreduce_1bit import OneBitState
from ..errors import CompressConfigError, CompressStateError
from . import exact, state
from .bucket import Bucket
from .kinds import Held
from .layout import Member, plan_buckets
from .policy import FLOATS, Compression


class BucketedOptimizer(Optimizer):
    """A torch optimizer whose state lies in flat buckets.

    Attributes:
        compression: how bytes travel.
        num_steps: steps taken, without those that were skipped.
        names: of the parameters that need gradients, by index, as checkpoints call them.
    """

    numbers_kept: ClassVar[Mapping[str, float]] = {"step": 0, "scale": 1.0}
    """What is kept of each parameter, one number each, and what it is at first."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        group: dist.ProcessGroup | None,
        compression: Compression | None,
    ) -> None:
        super().__init__(params, defaults)
        self.compression = compression or Compression()
        self.num_steps = 0
        self.names: list[str] = []
        self._group = group
        self._joined: Wire | None = None
        self._params: list[Tensor] = []
        self._buckets: list[Bucket] = []
        self._signs: dict[str, OneBitState] = {}
        self._called: dict[int, tuple[str, tuple[int, ...]]] = {}

    # -- what a subclass says ---------------------------------------------------------------------------------

    @abstractmethod
    def keys(self, progress: Mapping[str, Any], *, low: bool) -> dict[str, Held]:
        """The state tensors of a bucket at some progress; `low`: its parameters are not fp32."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """How far training has come: plain numbers, the same on every rank."""

    @abstractmethod
    def _set_progress(self, progress: Mapping[str, Any]) -> None:
        """Go on from `progress()`."""

    def _may_grow(self) -> bool:
        """Whether parameters may still be added after the first step."""
        return False

    def call_parameters(self, called: Mapping[int, tuple[str, tuple[int, ...]]]) -> None:
        """Names and shapes in checkpoints, by `id` of the parameter, where it is a part of something else's."""
        self._called.update(called)

    def use_group(self, group: dist.ProcessGroup) -> None:
        """Be one of these ranks.

        Raises:
            CompressConfigError: it has another group, or has taken steps.
        """
        other = self._group is not None and dist.get_process_group_ranks(self._group) != (
            dist.get_process_group_ranks(group)
        )
        if other or self._params:
            raise CompressConfigError(
                f"{type(self).__name__}: expected a new optimizer with group=None or the model's, got "
                + ("another group" if other else "one that has been used")
            )
        self._group = group

    @torch.no_grad()
    def take_values(self) -> None:
        """Something has written parameters in a way that cannot be seen at them: step from what they are now."""
        for bucket in self._buckets:
            bucket.take_values()
        self._note()

    def places(self) -> dict[int, int]:
        """Index of each parameter by its `id`."""
        self._plan()
        return {id(param): index for index, param in enumerate(self._params)}

    # -- planning ---------------------------------------------------------------------------------------------

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks.

        Raises:
            CompressConfigError: none was given, and torch.distributed is not initialised.
        """
        if self._group is None:
            if not dist.is_initialized():
                raise CompressConfigError(
                    f"{type(self).__name__}: expected group=, or torch.distributed initialised: call "
                    "torch.distributed.init_process_group before the first step"
                )
            self._group = dist.distributed_c10d._get_default_group()
        return self._group

    def _wire(self) -> Wire:
        """The way to the other ranks; the first call is collective."""
        if self._joined is None:
            self._plan()
            device = self._params[0].device if self._params else torch.device("cpu")
            timeout_s = self.compression.timeout_s
            wire = Wire(self.group, PlainCollectives(self.group, timeout_s), device, timeout_s)
            wire.salt = wire.broadcast_text("name of the optimizer", secrets.token_hex(4))
            self._joined = wire
        self._joined.fate.num_steps = self.num_steps
        return self._joined

    def _plan(self) -> None:
        """Give every parameter that needs gradients a place; again when more of them do."""
        known = {id(param) for param in self._params}
        members: list[Member] = []
        new: list[Tensor] = []
        position = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for place, param in enumerate(group["params"]):
                if param.requires_grad and param.numel() and id(param) not in known:
                    name = names[place] if names is not None else f"param.{position}"
                    _check_param(type(self).__name__, name, param)
                    name, saved_shape = self._called.get(id(param), (name, tuple(param.shape)))
                    index, kind = len(self._params) + len(new), f"{param.device} {param.dtype}"
                    members.append(Member(index, name, tuple(param.shape), saved_shape, number, kind))
                    new.append(param)
                position += 1
        if not new:
            return
        if self.num_steps and not self._may_grow():
            raise CompressStateError(
                f"{type(self).__name__}: parameter '{members[0].name}' began to need gradients after compression had "
                "begun: its variance is not known; unfreeze it, or add its group, while warm-up lasts"
            )
        devices = {param.device for param in [*self._params, *new]}
        if len(devices) > 1:
            raise CompressConfigError(
                f"{type(self).__name__}: expected parameters on one device, got {sorted(map(str, devices))}"
            )
        self._params += new
        self.names += [member.name for member in members]
        plans = plan_buckets(members, self.compression.bucket_bytes // 4, first=len(self._buckets))
        for plan in plans:
            placed = [self._params[slot.index] for slot in plan.slots]
            numbers = {key: [first] * len(placed) for key, first in self.numbers_kept.items()}
            bucket = Bucket(plan, placed, numbers=numbers)
            self._buckets.append(bucket)
            self._allocate(bucket, self.progress())

    def _span(self, bucket: Bucket, held: Held) -> tuple[int, int]:
        return held.span(bucket.plan.numel, self.group.size(), self.group.rank())

    def _allocate(self, bucket: Bucket, progress: Mapping[str, Any]) -> None:
        """Exactly the state that belongs to some progress; what was there and still does stays."""
        wanted = self.keys(progress, low=bucket.dtype != torch.float32)
        for key in bucket.flat.keys() - wanted.keys():
            del bucket.flat[key]
        for key, held in wanted.items():
            start, stop = self._span(bucket, held)
            if key in bucket.flat and bucket.flat[key].numel() == stop - start:
                continue
            if key == "master":
                bucket.make_master((start, stop))
            else:
                bucket.flat[key] = torch.zeros(stop - start, device=bucket.device)
        if "worker_error" in wanted:
            name = bucket.plan.name
            self._signs[name] = OneBitState(name, bucket.flat["worker_error"], bucket.flat["server_error"])

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, which is for this rank alone: see `merge_states` for any other number of ranks.

        As torch's: "state" by the parameters' indices, "param_groups"; and "compression": rank, world, how tensors are
        held, and how far training has come. Tensors are live memory.
        """
        self._plan()
        groups = super().state_dict()["param_groups"]
        keys = self._keyed(self.progress())
        world, rank = self.group.size(), self.group.rank()
        held = {key: how.value for _, each in keys for key, how in each.items()}
        return {
            "state": state.to_plain(keys, world, rank),
            "param_groups": groups,
            "compression": {"rank": rank, "world": world, "held": held, "progress": self.progress()},
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
        given = state_dict["compression"]
        self._check_kind(given["progress"])
        own = (self.group.rank(), self.group.size())
        if given["rank"] is not None and (given["rank"], given["world"]) != own:
            raise CompressStateError(
                f"load_state_dict: expected the state of rank {own[0]} of {own[1]}, got that of rank {given['rank']} "
                f"of {given['world']}; save each rank's, and load merge_states([...]) on another number of ranks"
            )
        found = [
            (place, state.find_plain(place, state_dict["state"]))
            for bucket, keys in self._keyed(given["progress"])
            for place in state.places(bucket, keys, own[1], own[0])
        ]
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = dict(state_dict["state"].items())
        self._take_over(given["progress"], {self.names[index]: values for index, values in numbers.items()})
        for place, values in found:
            place.local().copy_(values)
        self._loaded()

    def scalars(self) -> dict[str, Any]:
        """What `sharded_state` leaves out: progress, and numbers of each parameter; plain values, the same on all."""
        self._plan()
        return {
            "progress": self.progress(),
            "world": self.group.size(),
            "numbers": {
                slot.name: {key: numbers[slot.position] for key, numbers in bucket.numbers.items()}
                for bucket in self._buckets
                for slot in bucket.plan.slots
            },
        }

    def sharded_state(self) -> dict[str, Shard]:
        """This rank's state as ranges of tensors, for whoever saves those: `name -> Shard`, see `optimizers.state`."""
        self._plan()
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
        for bucket, keys in self._keyed(scalars["progress"]):
            for place in state.places(bucket, keys, world, rank):
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
        for bucket, keys in self._keyed(scalars["progress"]):
            for place in state.places(bucket, keys, world, rank):
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
            for slot in bucket.plan.slots:
                known = numbers.get(slot.name, {})
                for key, row in bucket.numbers.items():
                    row[slot.position] = known.get(key, row[slot.position])

    def _loaded(self) -> None:
        """State has been loaded; parameters follow where they must."""
        self._note()

    def _note(self) -> None:
        """What is written to parameters from now on is an edit.

        All buckets at once: parameters that are views of one tensor share its version counter.
        """
        for bucket in self._buckets:
            bucket.note()

    def _check_kind(self, progress: Mapping[str, Any]) -> None:
        if progress["kind"] != type(self).__name__:
            raise CompressStateError(
                f"expected the state of {type(self).__name__}, got that of {progress['kind']}; build that optimizer"
            )

    def _keyed(self, progress: Mapping[str, Any]) -> list[tuple[Bucket, dict[str, Held]]]:
        return [(bucket, self.keys(progress, low=bucket.dtype != torch.float32)) for bucket in self._buckets]


def _check_param(what: str, name: str, param: Tensor) -> None:
    if param.dtype not in FLOATS or param.layout is not torch.strided:
        raise CompressConfigError(
            f"{what}: parameter '{name}': expected a dense float32, bfloat16 or float16 tensor, got {param.dtype}, "
            f"{param.layout}"
        )
