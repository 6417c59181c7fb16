"""What a user chooses about a checkpoint: what is computed again, and where its inputs wait.

Frozen, keyword-only, validated on construction. The buffers that a policy asks for belong to the object: calls that are
given the same one share them, and they go with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..config import Overlap
from ..errors import ZeroConfigError
from ..groups import resolve_groups
from .arena import Arena
from .holders import Copies, Holder
from .host import HostPool
from .partition import Partition
from .region import Keeper


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """How a checkpoint saves memory; no setting changes a bit of the result.

    `partition` may be combined with `host` or with `contiguous_bytes`, and `save_ops` with all of them.

    Args:
        save_ops: ops such as `torch.ops.aten.mm.default` whose outputs are saved; all else is computed again. Allows
            one backward through a graph.
        partition: a group or one-dimensional mesh whose ranks call with identical inputs (tensor or sequence parallel):
            each rank keeps 1/N of every input and gathers it in backward. All its ranks must run the checkpoints, and
            their backward, in one order.
        verify: compare a checksum of every partitioned input over the group.
        host: keep inputs in (pinned) host memory; in backward they are fetched one checkpoint ahead.
        host_bytes: bound of that memory; inputs beyond it stay on their device. None: no bound.
        contiguous_bytes: keep inputs in one buffer per device (and stream that computes), of this size, allocated with
            the first input. A full buffer is an error that names the size to give.
        min_bytes: with partition, host or contiguous_bytes: inputs smaller than this, or not floating-point, are kept
            as they are. None: 4096.
        preserve_rng: restore the random state for the recomputation, so that dropout drops the same.
        timeout_s: with partition: seconds after which a gather on the CPU that has not finished is an error. None: as
            `zero_core.Overlap`.

    Raises:
        ZeroConfigError: a value out of range, or a setting that would have no effect beside the others.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016), section 4; ZeRO (2020), section 6
    (partitioned, to host, contiguous).
    """

    save_ops: Sequence[torch._ops.OpOverload] = ()
    partition: DeviceMesh | dist.ProcessGroup | None = None
    verify: bool = False
    host: bool = False
    host_bytes: int | None = None
    contiguous_bytes: int | None = None
    min_bytes: int | None = None
    preserve_rng: bool = True
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for op in self.save_ops:
            if not isinstance(op, torch._ops.OpOverload):
                raise ZeroConfigError(
                    f"CheckpointPolicy(save_ops=...): expected ops such as torch.ops.aten.mm.default, got {op!r}"
                )
        if isinstance(self.partition, DeviceMesh) and self.partition.ndim != 1:
            raise ZeroConfigError(
                "CheckpointPolicy(partition=...): expected a mesh of one dimension, got dimensions "
                f'{self.partition.mesh_dim_names or self.partition.ndim}; pass mesh["tp"] or the like'
            )
        if not isinstance(self.partition, DeviceMesh | dist.ProcessGroup | None):
            raise ZeroConfigError(
                "CheckpointPolicy(partition=...): expected a DeviceMesh or a ProcessGroup, got "
                f"{type(self.partition).__name__}"
            )
        for field in ("host_bytes", "contiguous_bytes", "min_bytes"):
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ZeroConfigError(
                    f"CheckpointPolicy({field}=...): expected a number of bytes >= 1, got {value!r}"
                )
        if self.timeout_s is not None and not (
            isinstance(self.timeout_s, int | float) and 0 < self.timeout_s < math.inf
        ):
            raise ZeroConfigError(
                f"CheckpointPolicy(timeout_s=...): expected seconds > 0, got {self.timeout_s!r}"
            )
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        if self.verify and self.partition is None:
            raise ZeroConfigError(
                "CheckpointPolicy(verify=True): it compares inputs over the ranks of partition, and that is None"
            )
        if self.host_bytes is not None and not self.host:
            raise ZeroConfigError(
                "CheckpointPolicy(host_bytes=...): it bounds host memory, and host is False"
            )
        if self.timeout_s is not None and self.partition is None:
            raise ZeroConfigError(
                "CheckpointPolicy(timeout_s=...): it is the deadline of gathers among the ranks of partition, and that "
                "is None"
            )
        elsewhere = self.host or self.partition is not None or self.contiguous_bytes is not None
        if self.min_bytes is not None and not elsewhere:
            raise ZeroConfigError(
                "CheckpointPolicy(min_bytes=...): without partition, host or contiguous_bytes all inputs are kept as "
                "they are; leave it out"
            )
        if self.host and self.contiguous_bytes is not None:
            raise ZeroConfigError(
                "CheckpointPolicy(host=True, contiguous_bytes=...): inputs wait either on the host, in a pool of its "
                "own, or in one buffer on their device; leave one of the two out"
            )

    @cached_property
    def keeper(self) -> Keeper:
        """What the policy holds at run time; made at the first use, without communication."""
        holder = self._holder()
        check = holder.check_alike if self.verify and isinstance(holder, Partition) else None
        min_bytes = 4096 if self.min_bytes is None else self.min_bytes
        return Keeper(holder, min_bytes, self.save_ops, check)

    def _holder(self) -> Holder | None:
        holder: Holder | None = None
        if self.host:
            holder = HostPool(self.host_bytes)
        elif self.contiguous_bytes is not None:
            holder = Arena(self.contiguous_bytes)
        if self.partition is None:
            return holder
        group = resolve_groups(self.partition).shard
        if group.size() == 1:
            return holder
        timeout_s = Overlap.timeout_s if self.timeout_s is None else self.timeout_s
        return Partition(group, holder or Copies(), timeout_s)
