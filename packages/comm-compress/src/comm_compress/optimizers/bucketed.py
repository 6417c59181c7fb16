"""Parameters in flat buckets, with everything that is kept for them: planned and allocated.

In: parameter groups. Out: `Bucket`s whose tensors are those that a subclass names for its progress (`keys`), and the
way to the other ranks. Next: `saved` saves and loads them, `base` steps them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from zero_core import PlainCollectives, Wire

from ..agreement import take_name
from ..allreduce_1bit import OneBitState
from ..errors import CompressConfigError, CompressStateError
from ..topology import group_or_default
from .bucket import Bucket
from .kinds import Held
from .layout import Member, plan_buckets
from .policy import FLOATS, Compression


class Elsewhere(defaultdict[Tensor, Any]):
    """What stands for `Optimizer.state`, which buckets have: to ask whether there is any is refused.

    `torch.distributed.checkpoint.state_dict` does, before it takes a step to have some; it would then leave out what
    belongs to no parameter, and of what each rank has its own of, keep one rank's.
    """

    def __init__(self, what: str) -> None:
        super().__init__(dict)
        self._what = what

    def __bool__(self) -> bool:
        raise CompressStateError(
            f"{self._what}: expected nobody to ask for Optimizer.state (as get_optimizer_state_dict and "
            "set_optimizer_state_dict do), since buckets have it, and parts are each rank's own; save "
            "optimizer.state_dict() of every rank (merge_states makes one of them), or optimizer.sharded_state()"
        )


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
        self.state = Elsewhere(type(self).__name__)
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
        """Something has written parameters in a way that cannot be seen at them: step from what they are now.

        Such as `param.data.clamp_(...)`, where masters are kept: parameters that are not fp32, `shard=True`, or
        `ZeroOneAdam` from `var_freeze_step` on.
        """
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
        self._group = group_or_default(self._group, type(self).__name__)
        return self._group

    def _wire(self) -> Wire:
        """The way to the other ranks; the first call is collective.

        Raises:
            CompressConfigError: a rank was given other settings: ranks would wait for each other, or step apart.
        """
        if self._joined is None:
            self._plan()
            device = self._device()
            timeout_s = self.compression.timeout_s
            wire = Wire(self.group, PlainCollectives(self.group, timeout_s), device, timeout_s)
            groups = [
                {key: _plain(value) for key, value in group.items() if key in self.defaults}
                for group in self.param_groups
            ]
            told = f"{self.settings()} {self.compression} {groups} {_kind_of(device)}"
            take_name(wire, type(self).__name__, told)
            self._joined = wire
        self._joined.fate.num_steps = self.num_steps
        return self._joined

    def _device(self) -> torch.device:
        """Where parameters are, those that are frozen yet, too."""
        some = [*self._params, *(param for group in self.param_groups for param in group["params"])]
        return some[0].device if some else torch.device("cpu")

    def settings(self) -> Any:
        """What a subclass was given besides `defaults` and `compression`; the same on every rank."""
        return None

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

    def _take_edits(self) -> None:
        """What others wrote to parameters goes into masters."""
        for bucket in self._buckets:
            bucket.take(bucket.edits())

    def _note(self) -> None:
        """What is written to parameters from now on is an edit.

        All buckets at once: parameters that are views of one tensor share its version counter.
        """
        for bucket in self._buckets:
            bucket.note()


def _kind_of(device: torch.device) -> str:
    """What ranks must have alike: how a kernel adds up a norm, which all must know to the bit, depends on it."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _check_param(what: str, name: str, param: Tensor) -> None:
    if param.dtype not in FLOATS or param.layout is not torch.strided:
        raise CompressConfigError(
            f"{what}: parameter '{name}': expected a dense float32, bfloat16 or float16 tensor, got {param.dtype}, "
            f"{param.layout}"
        )
    if isinstance(param, DTensor):
        raise CompressConfigError(
            f"{what}: parameter '{name}': expected a plain tensor, got a DTensor (FSDP2, tensor parallelism): every "
            "rank needs whole gradients of its own; use a plain loop, DDP, or zero_core.shard(stage=1)"
        )
