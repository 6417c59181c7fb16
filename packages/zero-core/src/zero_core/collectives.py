"""How a unit's bytes travel. The only module that calls torch.distributed (beside `diagnosis`, when it has failed).

In: a shard to be gathered, or a full gradient to be reduced. Out: a handle with `wait()`. `Collectives` is the seam:
`PlainCollectives` sends the bytes as they are, other packages compress or route them. `Wire` is what the rest of the
package holds: one group's collectives, with names, a deadline, and an error that says who was doing what.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .diagnosis import diagnose
from .errors import CollectiveError, ZeroConfigError

T = TypeVar("T")


class Handle(Protocol):
    """A collective on its way."""

    def wait(self) -> None:
        """Return when the output may be used; raise `RuntimeError` if it never can."""


class Collectives(Protocol):
    """How flat buffers travel within one group of N ranks.

    `tag` is the same on all ranks for one unit and direction, and differs between any two that may be under way at
    once: an implementation whose messages carry it cannot mistake one unit's bytes for another's.
    """

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """Fill `out` (n elements) with every rank's `shard` (n/N), in rank order; `shard` may be a view of `out`."""

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
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
        self.wire.guard(self.what, self.handle.wait)


@dataclass
class Fate:
    """Whether a collective of this model has failed: then no other is tried, and every wait ends at once."""

    failure: CollectiveError | None = None


class Wire:
    """One group's collectives, named and with a deadline.

    Args:
        group: the ranks.
        collectives: how bytes travel.
        device: where small values travel from.
        timeout_s: for messages.
        fate: shared by the wires of one model.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        collectives: Collectives,
        device: torch.device,
        timeout_s: float,
        fate: Fate | None = None,
    ) -> None:
        self.group = group
        self.collectives = collectives
        self.device = device
        self.timeout_s = timeout_s
        self.fate = fate or Fate()
        self._launched = 0

    def gather(self, name: str, shard: torch.Tensor, out: torch.Tensor) -> Pending:
        """All-gather `shard` into `out`; `name` goes into errors."""
        tag = _tag(f"gather of {name}", out)
        return self._launch(f"gather of {name}", lambda: self.collectives.all_gather(shard, out, tag=tag))

    def reduce(self, name: str, full: torch.Tensor, out: torch.Tensor) -> Pending:
        """Reduce-scatter the mean of `full` into `out`; `name` goes into errors."""
        tag = _tag(f"reduction of {name}", full)
        return self._launch(
            f"reduction of {name}", lambda: self.collectives.reduce_scatter(full, out, tag=tag)
        )

    def all_reduce(self, name: str, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> Pending:
        """All-reduce a few values (norms, verdicts) in place; these never go through the seam."""
        if self.device.type != "cpu":
            return self._launch(
                name, lambda: _Works([dist.all_reduce(tensor, op, self.group, async_op=True)], None)
            )
        received = [torch.empty_like(tensor) for _ in range(self.group.size())]
        sent = [tensor.clone()] * self.group.size()
        received[self.group.rank()] = sent[0]

        def combine() -> None:
            rows = torch.stack(received)
            if op == dist.ReduceOp.SUM:
                tensor.copy_(rows.sum(0))
            else:
                tensor.copy_(rows.amin(0) if op == dist.ReduceOp.MIN else rows.amax(0))

        tag = _tag(name, tensor)
        return self._launch(name, lambda: exchange(self.group, sent, received, tag, self.timeout_s, combine))

    def broadcast(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor` equal to that of the group's first rank."""
        rank, size = self.group.rank(), self.group.size()
        if size == 1 or not tensor.numel():
            return
        payload = tensor.contiguous()
        flat = _as_bytes(payload)
        if self.device.type != "cpu":
            source = dist.get_global_rank(self.group, 0)
            work = dist.broadcast(flat, source, group=self.group, async_op=True)
            self._launch(f"broadcast of {name}", lambda: _Works([work], None)).wait()
        else:
            sent = [flat if rank == 0 else flat[:0]] * size
            received = [flat if rank != 0 and r == 0 else flat[:0] for r in range(size)]
            tag = _tag(f"broadcast of {name}", tensor)
            launch = lambda: exchange(self.group, sent, received, tag, self.timeout_s)  # noqa: E731  # one expression
            self._launch(f"broadcast of {name}", launch).wait()
        if payload.data_ptr() != tensor.data_ptr():
            tensor.copy_(payload)

    def broadcast_text(self, name: str, text: str) -> str:
        """The first rank's `text`, on every rank."""
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        size = torch.tensor([encoded.numel()], dtype=torch.int64, device=self.device)
        self.broadcast(f"size of {name}", size)
        if self.group.rank() != 0:
            encoded = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.broadcast(name, encoded)
        return bytes(encoded.tolist()).decode()

    def _launch(self, name: str, call: Callable[[], Handle]) -> Pending:
        self._launched += 1
        what = f"collective {self._launched} ({name})"
        return Pending(self.guard(what, call), self, what)

    def guard(self, what: str, call: Callable[[], T]) -> T:
        """Run `call`; the first failure is explained, later ones are the same failure."""
        if self.fate.failure is not None:
            raise self.fate.failure
        try:
            return call()
        except RuntimeError as error:
            self.fate.failure = diagnose(self.group, what, self.timeout_s, error)
            raise self.fate.failure from error


class PlainCollectives:
    """The bytes as they are: by the back end's own collectives on an accelerator, by tagged messages on the CPU.

    Gloo's `reduce_scatter_tensor` takes 2-10 times as long as its messages and a local sum, its `all_gather` some 4
    times; and where ranks have come to different collectives it pairs them all the same, or aborts the process.
    Messages with the unit's tag just wait, and the deadline turns that into an error.

    Args:
        group: the ranks among which the bytes travel.
        timeout_s: deadline of a wait on the CPU (on an accelerator the back end's own watchdog decides).
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float = 60.0) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self._scratch: list[torch.Tensor] = []

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.all_gather`."""
        rank, size = self.group.rank(), self.group.size()
        if out.device.type != "cpu" and size > 1:
            return _Works([dist.all_gather_into_tensor(out, shard, group=self.group, async_op=True)], None)
        received = list(out.view(size, -1))
        handle = exchange(self.group, [shard] * size, received, tag, self.timeout_s)
        if received[rank].data_ptr() != shard.data_ptr():
            received[rank].copy_(shard)
        return handle

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.reduce_scatter`."""
        rank, size = self.group.rank(), self.group.size()
        if out.device.type != "cpu" and size > 1:
            wide = full.to(torch.promote_types(full.dtype, out.dtype))
            target = (
                out
                if wide.dtype == out.dtype
                else torch.empty(out.numel(), dtype=wide.dtype, device=out.device)
            )
            work = dist.reduce_scatter_tensor(
                target, wide, op=dist.ReduceOp.AVG, group=self.group, async_op=True
            )
            copy = None if target is out else lambda: out.copy_(target)
            return _Works([work], None, copy, keep=[wide, target])
        parts = list(full.view(size, -1))
        nbytes = parts[0].numel() * full.element_size()
        scratch = self._borrow(nbytes * (size - 1))
        received = (
            list(scratch[: nbytes * (size - 1)].view(full.dtype).view(size - 1, -1)) if size > 1 else []
        )
        received.insert(rank, parts[rank])

        def finish() -> None:
            mean_of(received, out)
            self._scratch.append(scratch)

        return exchange(self.group, parts, received, tag, self.timeout_s, finish)

    def _borrow(self, nbytes: int) -> torch.Tensor:
        """Bytes for what arrives; kept between reductions, since fresh pages cost more than the copy."""
        for position, buffer in enumerate(self._scratch):
            if buffer.numel() >= nbytes:
                return self._scratch.pop(position)
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        """See `Collectives.trim`."""
        self._scratch.clear()


@dataclass
class _Works:
    """Works of the process group, then something to do with what arrived.

    A time-out of None leaves the deadline to the back end. `keep` holds what must outlive the works.
    """

    works: Sequence[dist.Work]
    timeout_s: float | None
    then: Callable[[], object] | None = None
    keep: Sequence[torch.Tensor] = field(default_factory=list)

    def wait(self) -> None:
        for work in self.works:
            if self.timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout_s))
        if self.then is not None:
            self.then()


def exchange(
    group: dist.ProcessGroup,
    sent: Sequence[torch.Tensor],
    received: Sequence[torch.Tensor],
    tag: int,
    timeout_s: float,
    then: Callable[[], object] | None = None,
) -> Handle:
    """Send `sent[r]` to every other rank r and receive `received[r]` from it; empty tensors do not travel.

    Args:
        group: a group whose messages carry tags (gloo).
        sent: what goes to each rank, contiguous; the entry of this rank is not looked at.
        received: where to put what comes from each rank, likewise.
        tag: of these messages; a receive never matches another tag.
        timeout_s: deadline of the handle's `wait`.
        then: called when everything has arrived.
    """
    rank, works = group.rank(), []
    for step in range(1, group.size()):  # everyone starts with the next rank, so that no rank is flooded
        peer, source = (rank + step) % group.size(), (rank - step) % group.size()
        if received[source].numel():
            from_rank = dist.get_global_rank(group, source)
            works.append(dist.irecv(_as_bytes(received[source]), from_rank, group=group, tag=tag))
        if sent[peer].numel():
            works.append(
                dist.isend(_as_bytes(sent[peer]), dist.get_global_rank(group, peer), group=group, tag=tag)
            )
    return _Works([work for work in works if work is not None], timeout_s, then, [*sent, *received])


def mean_of(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """`out` = the mean of `parts`, summed in rank order in fp32 (or wider), rounded once; `out` may be one of them."""
    if len(parts) == 1:
        if out.data_ptr() != parts[0].data_ptr():
            out.copy_(parts[0])
    elif len(parts) == 2 and parts[0].dtype == out.dtype and out.dtype in (torch.float32, torch.float64):
        torch.add(parts[0], parts[1], out=out).mul_(0.5)
    else:
        total = parts[0].to(torch.promote_types(out.dtype, torch.float32), copy=True)
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total.mul_(1.0 / len(parts)))


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


def _tag(what: str, tensor: torch.Tensor) -> int:
    """31 bits that name a collective and its size, alike on every rank."""
    return zlib.crc32(f"{what} {tensor.numel()} {tensor.dtype}".encode()) & 0x7FFFFFFF


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: what travels is moved, not interpreted."""
    return tensor.detach().view(-1).view(torch.uint8)
