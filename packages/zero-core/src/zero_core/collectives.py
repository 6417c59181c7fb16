"""How a unit's bytes travel, and what happens when they do not arrive. The only module that calls torch.distributed.

In: a shard to be gathered, or a full gradient to be reduced. Out: a handle with `wait()`. `Collectives` is the seam:
`PlainCollectives` sends the bytes as they are, other packages compress or route them. `Wire` adds what every
implementation needs: a deadline, and an error that says which unit, which ranks, and what each was doing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import CollectiveError, ZeroConfigError

T = TypeVar("T")


class Handle(Protocol):
    """A collective on its way."""

    def wait(self) -> None:
        """Return when the output may be used; raise `RuntimeError` if it never can."""


class Collectives(Protocol):
    """How flat buffers travel within one group of N ranks; every rank calls in the same order."""

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor) -> Handle:
        """Fill `out` (n elements) with every rank's `shard` (n/N), in rank order; `shard` may be a view of `out`."""

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor) -> Handle:
        """Write the mean over ranks of this rank's n/N slice of `full` to `out`.

        `out` may be that very slice of `full`, and may have another dtype; sums are formed in at least fp32.
        The rest of `full` holds nothing of meaning afterwards.
        """

    def trim(self) -> None:
        """Give scratch memory back; called when a backward pass has ended."""


@dataclass(frozen=True)
class Pending:
    """A collective on its way, with a name for the error message."""

    handle: Handle
    wire: Wire
    what: str

    def wait(self) -> None:
        """Finish it.

        Raises:
            CollectiveError: a rank died, or the deadline passed.
        """
        try:
            self.handle.wait()
        except RuntimeError as error:
            raise self.wire.diagnose(self.what, error) from error


class Wire:
    """One group's collectives with deadlines and a diagnosis; sequence numbers tell who fell behind."""

    def __init__(
        self, group: dist.ProcessGroup, collectives: Collectives, device: torch.device, timeout_s: float
    ) -> None:
        self.group = group
        self.collectives = collectives
        self.device = device
        self.timeout_s = timeout_s
        self.num_launched = 0

    def gather(self, name: str, shard: torch.Tensor, out: torch.Tensor) -> Pending:
        """All-gather `shard` into `out`; `name` goes into errors."""
        what = self._next(f"gather of {name}")
        return Pending(self._launch(what, lambda: self.collectives.all_gather(shard, out)), self, what)

    def reduce(self, name: str, full: torch.Tensor, out: torch.Tensor) -> Pending:
        """Reduce-scatter the mean of `full` into `out`; `name` goes into errors."""
        what = self._next(f"reduction of {name}")
        return Pending(self._launch(what, lambda: self.collectives.reduce_scatter(full, out)), self, what)

    def all_reduce(self, name: str, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> Pending:
        """All-reduce a few values (norms, verdicts) in place; these never go through the seam."""
        what = self._next(name)
        work = self._launch(what, lambda: dist.all_reduce(tensor, op=op, group=self.group, async_op=True))
        return Pending(_Works([work], self.timeout_s), self, what)

    def broadcast(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor` equal to that of the group's first rank."""
        if self.group.size() > 1 and tensor.numel():
            what, source = self._next(f"broadcast of {name}"), dist.get_global_rank(self.group, 0)
            payload = tensor.contiguous()
            work = self._launch(
                what, lambda: dist.broadcast(_as_bytes(payload), source, group=self.group, async_op=True)
            )
            Pending(_Works([work], self.timeout_s), self, what).wait()
            if payload.data_ptr() != tensor.data_ptr():
                tensor.copy_(payload)

    def broadcast_text(self, name: str, text: str) -> str:
        """The first rank's `text`, on every rank."""
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor([encoded.numel()], dtype=torch.int64, device=self.device)
        self.broadcast(f"{name} (size)", size)
        if self.group.rank() != 0:
            encoded = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.broadcast(name, encoded)
        return bytes(encoded.tolist()).decode()

    def _next(self, what: str) -> str:
        self.num_launched += 1
        return f"collective {self.num_launched} ({what})"

    def _launch(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            raise self.diagnose(what, error) from error

    def diagnose(self, what: str, error: RuntimeError) -> CollectiveError:
        """Say what this rank and the others were waiting for.

        Every rank that fails writes its last collective into the group's store; whoever has written nothing
        within a few seconds is dead or still computing.
        """
        rank, size = self.group.rank(), self.group.size()
        others = _exchange_positions(self.group, what, patience_s=min(5.0, self.timeout_s))
        lines = [
            f"rank {r} was at {others[r]}"
            if r in others
            else f"rank {r} gives no sign: it died, or has not come this far"
            for r in range(size)
            if r != rank
        ]
        return CollectiveError(
            f"rank {rank} of {size}: {what} did not finish within {self.timeout_s:g} s or lost its peer; "
            f"{'; '.join(lines)}. All ranks must use the same units in the same order; end the job, look at the "
            f"first rank that failed, and resume from a checkpoint. Cause: {str(error).strip().splitlines()[0]}"
        )


def _exchange_positions(group: dist.ProcessGroup, position: str, patience_s: float) -> dict[int, str]:
    """What each rank of the group that fails within `patience_s` says it was doing."""
    found: dict[int, str] = {}
    try:
        store = dist.distributed_c10d._get_default_store()
        key = "zero_core/failure/" + group.group_name
        store.set(f"{key}/{group.rank()}", json.dumps(position))
        deadline = time.monotonic() + patience_s
        while len(found) < group.size() - 1 and time.monotonic() < deadline:
            for rank in set(range(group.size())) - {group.rank()} - set(found):
                if store.check([f"{key}/{rank}"]):
                    found[rank] = json.loads(store.get(f"{key}/{rank}"))
            time.sleep(0.05)
    except RuntimeError:  # the store lives on a rank that is gone
        pass
    return found


class PlainCollectives:
    """The bytes as they are: by the back end's own collectives, or, on gloo, by the faster of its primitives.

    On gloo an all-to-all and a local sum reduce 2-10 times faster than its `reduce_scatter_tensor`, and one
    asynchronous broadcast a shard gathers faster than its `all_gather_into_tensor`.

    Args:
        group: the ranks among which the bytes travel.
        timeout_s: deadline of a wait, where the back end lets a wait end (gloo does).
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float = 60.0) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self._scratch: list[torch.Tensor] = []

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor) -> Handle:
        """See `Collectives.all_gather`."""
        rank, size, n = self.group.rank(), self.group.size(), shard.numel()
        mine = out[rank * n : (rank + 1) * n]
        if size > 1 and out.device.type != "cpu":
            return _Works([dist.all_gather_into_tensor(out, shard, group=self.group, async_op=True)], None)
        works = []
        for source in range(size if size > 1 else 0):
            payload = shard if source == rank else out[source * n : (source + 1) * n]
            global_source = dist.get_global_rank(self.group, source)
            works.append(dist.broadcast(_as_bytes(payload), global_source, group=self.group, async_op=True))
        if mine.data_ptr() != shard.data_ptr():
            mine.copy_(shard)
        return _Works(works, self.timeout_s)

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor) -> Handle:
        """See `Collectives.reduce_scatter`."""
        size = self.group.size()
        if size == 1:
            if out.data_ptr() != full.data_ptr():
                out.copy_(full)
            return _Works([], None)
        if full.device.type != "cpu":
            wide = full if full.dtype == out.dtype else full.to(torch.promote_types(full.dtype, out.dtype))
            target = (
                out
                if wide.dtype == out.dtype
                else torch.empty(out.numel(), dtype=wide.dtype, device=out.device)
            )
            work = dist.reduce_scatter_tensor(
                target, wide, op=dist.ReduceOp.AVG, group=self.group, async_op=True
            )
            return _CastAfter(_Works([work], None), target, out, keep=wide)
        scratch = self._borrow(full.numel() * full.element_size())
        received = scratch[: full.numel() * full.element_size()].view(full.dtype)
        work = dist.all_to_all_single(_as_bytes(received), _as_bytes(full), group=self.group, async_op=True)
        return _SumAfter(_Works([work], self.timeout_s), received.view(size, -1), out, scratch, self._scratch)

    def _borrow(self, nbytes: int) -> torch.Tensor:
        """Bytes for what arrives; kept between reductions, since fresh pages cost more than the copy."""
        for position, buffer in enumerate(self._scratch):
            if buffer.numel() >= nbytes:
                return self._scratch.pop(position)
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        """See `Collectives.trim`."""
        self._scratch.clear()


class _Works:
    """Works of the process group; None as a time-out leaves it to the back end (NCCL's watchdog)."""

    def __init__(self, works: Sequence[dist.Work], timeout_s: float | None) -> None:
        self._works = works
        self._timeout_s = timeout_s

    def wait(self) -> None:
        for work in self._works:
            if self._timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self._timeout_s))


@dataclass
class _SumAfter:
    """All-to-all, then the mean of what came, in rank order: the same bits at every launch."""

    arrived: Handle
    parts: torch.Tensor
    out: torch.Tensor
    scratch: torch.Tensor
    pool: list[torch.Tensor]

    def wait(self) -> None:
        self.arrived.wait()
        mean_of_rows(self.parts, self.out)
        self.pool.append(self.scratch)


@dataclass
class _CastAfter:
    arrived: Handle
    target: torch.Tensor
    out: torch.Tensor
    keep: torch.Tensor

    def wait(self) -> None:
        self.arrived.wait()
        if self.target.data_ptr() != self.out.data_ptr():
            self.out.copy_(self.target)


def mean_of_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """`out` = the mean over dim 0 of `rows` [N, n], summed in fp32 (or wider) and rounded once."""
    if rows.dtype in (torch.float32, torch.float64) and rows.dtype == out.dtype:
        torch.add(rows[0], rows[1], out=out)
        for row in rows[2:]:
            out.add_(row)
        out.mul_(1.0 / rows.shape[0])
    else:
        total = rows[0].to(torch.promote_types(out.dtype, torch.float32))
        for row in rows[1:]:
            total.add_(row)
        out.copy_(total.mul_(1.0 / rows.shape[0]))


def resolve_group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The process group to shard over: a one-dimensional mesh's own, or that of a larger mesh's "dp" dimension."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise ZeroConfigError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    if mesh.ndim == 1:
        return mesh.get_group()
    if "dp" in (mesh.mesh_dim_names or ()):
        return mesh["dp"].get_group()
    raise ZeroConfigError(
        f"mesh: expected one dimension, or one named 'dp', got dimensions {mesh.mesh_dim_names or mesh.ndim}; "
        'pass mesh["name"]'
    )


def sibling_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A second group of the same ranks, so that gathers and reductions need no common order.

    Every rank of `group` must call it; ranks outside need not.
    """
    ranks = dist.get_process_group_ranks(group)
    return cast(dist.ProcessGroup, dist.new_group(ranks, use_local_synchronization=True))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: what travels is moved, not interpreted."""
    return tensor.detach().view(-1).view(torch.uint8)
