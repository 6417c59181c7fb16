"""How a unit's bytes travel. With `groups`, `exchange` and `shared_memory`, all that calls torch.distributed.

In: a shard to be gathered, or a full gradient to be reduced. Out: a handle with `wait()`. `Collectives` is the seam:
`PlainCollectives` sends the bytes as they are, other packages compress or route them. `Wire` is what the rest of the
package holds: one group's collectives, with names, a deadline, and an error that says who was doing what.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from .diagnosis import diagnose
from .errors import CollectiveError
from .exchange import Messages, Works, as_bytes, exchange
from .shared_memory import SharedMemory, connect

T = TypeVar("T")


class Handle(Protocol):
    """A collective on its way."""

    def wait(self) -> None:
        """Return when the output may be used; raise `RuntimeError` if it never can."""


def is_done(handle: Handle) -> bool:
    """Whether `wait` need not wait for another rank, as far as is known: handles may have an `is_done()`."""
    ask: Callable[[], bool] | None = getattr(handle, "is_done", None)
    return ask is None or ask()


class Collectives(Protocol):
    """How flat buffers travel within one group of N ranks.

    `tag` is the same on all ranks for one unit and direction, and differs between any two that may be under way at
    once: an implementation whose messages carry it cannot mistake one unit's bytes for another's.
    """

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """Fill `out` (n elements) with every rank's `shard` (n/N), in rank order; `shard` may be a view of `out`."""

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """Write the mean over ranks of this rank's n/N slice of `full` to `out`.

        `out` may be that very slice of `full`, and may have another dtype. On the CPU sums are formed in at least fp32;
        an accelerator's back end forms them in the wider of the two dtypes (`Precision(reduce=torch.float32)`).
        The rest of `full` holds nothing of meaning afterwards.
        """

    def trim(self) -> None:
        """Give scratch memory back; called when a backward pass has ended."""


class WeightCollectives(Protocol):
    """What `Collectives` may offer besides: gathers of parameters to compute with. `all_gather` is for exact values.

    Both or neither; an object without them gathers everything by `all_gather`.
    """

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> bool:
        """Whether `gather_weights` brings the shards' own values, of a unit that has `nbytes` when whole."""

    def gather_weights(
        self,
        shard: Callable[[], torch.Tensor],
        out: torch.Tensor,
        *,
        tag: int,
        version: int | None,
        trainable: bool,
    ) -> Handle:
        """Fill `out` as `all_gather` does, perhaps with approximations: the same on all ranks, the shard's owner too.

        Args:
            shard: gives this rank's shard, which may lie in `out`; not called where nobody needs it.
            out: as for `all_gather`.
            tag: as for `all_gather`.
            version: two gathers with one tag and one version, not None, bring the same values: no rank's shard has
                changed between them. All ranks give the same. None: nobody will ask for these values again.
            trainable: whether an optimizer may change the shards.
        """


class Observer(Protocol):
    """Who measures collectives of units."""

    def begin(self, kind: str, name: str, full: torch.Tensor) -> AbstractContextManager[object]:
        """A collective is launched; what is returned is entered once, around the wait for it.

        Args:
            kind: "gather" or "reduce".
            name: the unit's label.
            full: the whole buffer that is gathered or reduced.
        """


@dataclass(frozen=True)
class Pending:
    """A collective on its way, with a name for the error message; `waiting` is entered around the wait for it."""

    handle: Handle
    wire: Wire
    what: str
    waiting: AbstractContextManager[object] = field(default_factory=nullcontext)

    def is_done(self) -> bool:
        """See `is_done`; what it finds wrong is a `CollectiveError` too."""
        return self.wire.guard(self.what, lambda: is_done(self.handle))

    def wait(self) -> None:
        """Finish it.

        Raises:
            CollectiveError: a rank died, or the deadline passed.
        """
        with self.waiting:
            self.wire.guard(self.what, self.handle.wait)


@dataclass
class Fate:
    """How far a model has come.

    Attributes:
        num_steps: steps of its optimizers so far.
        failure: of a collective: then no other is tried, and every wait ends at once.
    """

    num_steps: int = 0
    failure: CollectiveError | None = None


class Wire:
    """One group's collectives, named and with a deadline.

    Args:
        group: the ranks.
        collectives: how bytes travel.
        device: where small values travel from.
        timeout_s: for messages.
        fate: shared by the wires of one model.

    Attributes:
        salt: goes into tags: that of one model, so that no other model's bytes are taken for its own.
        observer: measures gathers and reductions, or None.
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
        self.salt = ""
        self.observer: Observer | None = None
        self._launched = 0
        self._own_way: Messages | SharedMemory | None = None

    def gather(self, name: str, shard: torch.Tensor, out: torch.Tensor) -> Pending:
        """All-gather `shard` into `out`; `name` goes into errors."""
        tag = _tag(f"gather of {name}{self.salt}", out)
        launch = lambda: self.collectives.all_gather(shard, out, tag=tag)  # noqa: E731  # one expression
        return self._launch(f"gather of {name}", launch, ("gather", name, out))

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> bool:
        """Whether `gather_weights` brings the shards' own values; see `WeightCollectives.is_exact`."""
        ask: Callable[..., bool] | None = getattr(self.collectives, "is_exact", None)
        return ask is None or self.group.size() == 1 or ask(nbytes, dtype, trainable=trainable)

    def gather_weights(
        self,
        name: str,
        shard: Callable[[], torch.Tensor],
        out: torch.Tensor,
        *,
        version: int | None,
        trainable: bool,
    ) -> Pending:
        """All-gather parameters to compute with; see `WeightCollectives.gather_weights`."""
        offered: Callable[..., Handle] | None = getattr(self.collectives, "gather_weights", None)
        if offered is None:
            return self.gather(name, shard(), out)
        tag = _tag(f"gather of {name}{self.salt}", out)
        launch = partial(offered, shard, out, tag=tag, version=version, trainable=trainable)
        return self._launch(f"gather of {name}", launch, ("gather", name, out))

    def reduce(self, name: str, full: torch.Tensor, out: torch.Tensor) -> Pending:
        """Reduce-scatter the mean of `full` into `out`; `name` goes into errors."""
        tag = _tag(f"reduction of {name}{self.salt}", full)
        launch = lambda: self.collectives.reduce_scatter(full, out, tag=tag)  # noqa: E731  # one expression
        return self._launch(f"reduction of {name}", launch, ("reduce", name, full))

    def all_reduce(self, name: str, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> Pending:
        """All-reduce a few values (norms, verdicts) in place; these never go through the seam."""
        if self.device.type != "cpu":
            return self._launch(
                name, lambda: Works([dist.all_reduce(tensor, op, self.group, async_op=True)], None)
            )

        def combine(parts: Sequence[torch.Tensor]) -> None:
            rows = torch.stack(list(parts))
            if op == dist.ReduceOp.SUM:
                total = rows.sum(0)
            else:
                total = rows.amin(0) if op == dist.ReduceOp.MIN else rows.amax(0)
            tensor.copy_(total.view_as(tensor))

        tag = _tag(name + self.salt, tensor)
        sent = [tensor.flatten().clone()] * self.group.size()
        return self._launch(name, lambda: self.connect().swap(sent, tag, then=combine))

    def consult(self, name: str, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's `numbers` (int64, as many on each), by rank; the wire's device must be the CPU."""
        own = torch.tensor(numbers, dtype=torch.int64)
        heard: list[list[int]] = []

        def hear(parts: Sequence[torch.Tensor]) -> None:
            heard.extend(part.tolist() for part in parts)

        tag, sent = _tag(f"consultation{self.salt}", own), [own] * self.group.size()
        self._launch(name, lambda: self.connect().swap(sent, tag, then=hear)).wait()
        return heard

    def swap(self, name: str, sent: Sequence[torch.Tensor], received: Sequence[torch.Tensor]) -> Pending:
        """Send `sent[r]` to every other rank r and receive `received[r]` from it; never through the seam.

        Sizes may differ from rank to rank; empty tensors do not travel. This rank's own entries are not looked at.
        """
        if self.device.type != "cpu":
            rank = self.group.rank()
            out, into = list(sent), list(received)
            out[rank] = into[rank] = sent[rank].new_empty(0)
            return self._launch(
                name,
                lambda: Works(
                    [dist.all_to_all(into, out, group=self.group, async_op=True)], None, keep=[*out, *into]
                ),
            )
        tag = _tag(f"swap of {name}{self.salt}")
        return self._launch(name, lambda: exchange(self.group, sent, received, tag, self.timeout_s))

    def broadcast(self, name: str, tensor: torch.Tensor) -> None:
        """Make `tensor` equal to that of the group's first rank."""
        rank, size = self.group.rank(), self.group.size()
        if size == 1 or not tensor.numel():
            return
        payload = tensor.contiguous()
        flat = as_bytes(payload)
        if self.device.type != "cpu":
            source = dist.get_global_rank(self.group, 0)
            work = dist.broadcast(flat, source, group=self.group, async_op=True)
            self._launch(f"broadcast of {name}", lambda: Works([work], None)).wait()
        else:
            sent = [flat if rank == 0 else flat[:0]] * size
            received = [flat if rank != 0 and r == 0 else flat[:0] for r in range(size)]
            tag = _tag(f"broadcast of {name}{self.salt}", tensor)
            launch = lambda: exchange(self.group, sent, received, tag, self.timeout_s)  # noqa: E731  # one expression
            self._launch(f"broadcast of {name}", launch).wait()
        if payload.data_ptr() != tensor.data_ptr():
            tensor.copy_(payload)

    def broadcast_text(self, name: str, text: str) -> str:
        """The first rank's `text`, on every rank."""
        return self.broadcast_bytes(name, text.encode()).decode()

    def broadcast_bytes(self, name: str, data: bytes) -> bytes:
        """The first rank's `data`, on every rank."""
        encoded = torch.tensor(list(data), dtype=torch.uint8, device=self.device)
        size = torch.tensor([encoded.numel()], dtype=torch.int64, device=self.device)
        self.broadcast(f"size of {name}", size)
        if self.group.rank() != 0:
            encoded = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        self.broadcast(name, encoded)
        return bytes(encoded.tolist())

    def gather_json(self, name: str, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order."""
        rank, size = self.group.rank(), self.group.size()
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor([text.numel()], dtype=torch.int64, device=self.device)
        lengths = [length if r == rank else torch.empty_like(length) for r in range(size)]
        self.swap(f"lengths of {name}", [length] * size, lengths).wait()
        texts = [text if r == rank else text.new_empty(int(lengths[r])) for r in range(size)]
        self.swap(name, [text] * size, texts).wait()
        return [json.loads(bytes(each.tolist())) for each in texts]

    def connect(self) -> Messages | SharedMemory:
        """The way of small values on the CPU: the collectives' own, if they have one; collective at first."""
        if isinstance(self.collectives, PlainCollectives):
            return self.collectives.way()
        if self._own_way is None:
            self._own_way = connect(self.group, self.timeout_s) or Messages(self.group, self.timeout_s)
        return self._own_way

    def _launch(
        self, name: str, call: Callable[[], Handle], seen: tuple[str, str, torch.Tensor] | None = None
    ) -> Pending:
        self._launched += 1
        what = f"collective {self._launched} ({name}) of step {self.fate.num_steps + 1}"
        if self.observer is None or seen is None:
            return Pending(self.guard(what, call), self, what)
        waiting = self.observer.begin(*seen)
        return Pending(self.guard(what, call), self, what, waiting)

    def fail(self, message: str) -> CollectiveError:
        """The error to raise where ranks cannot go on; later collectives raise it too."""
        self.fate.failure = CollectiveError(message)
        return self.fate.failure

    def guard(self, what: str, call: Callable[[], T]) -> T:
        """Run `call`; the first failure is explained, later ones are the same failure."""
        if self.fate.failure is not None:
            raise self.fate.failure
        try:
            return call()
        except (RuntimeError, OSError) as error:
            self.fate.failure = diagnose(self.group, what, self.timeout_s, error)
            raise self.fate.failure from error


class PlainCollectives:
    """The bytes as they are: by the back end on an accelerator, by `shared_memory` or `exchange` on the CPU.

    Gloo's `reduce_scatter_tensor` takes 2-10 times as long as its messages and a local sum, its `all_gather` some 4
    times; and where ranks have come to different collectives it pairs them all the same, or aborts the process.
    Messages with the unit's tag just wait, and the deadline turns that into an error.

    Args:
        group: the ranks among which the bytes travel.
        timeout_s: deadline of a wait on the CPU (on an accelerator the back end's own watchdog decides).
        shared_memory: on the CPU, use memory that the ranks share if all of them are on one machine.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float = 300.0, *, shared_memory: bool = True
    ) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self.shared_memory = shared_memory
        self._way: Messages | SharedMemory | None = None

    def all_gather(self, shard: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.all_gather`."""
        rank, size = self.group.rank(), self.group.size()
        if out.device.type != "cpu" and size > 1:
            return Works([dist.all_gather_into_tensor(out, shard, group=self.group, async_op=True)], None)
        received = list(out.view(size, -1))
        handle = self.way().swap([shard] * size, tag, into=received)
        if received[rank].data_ptr() != shard.data_ptr():
            received[rank].copy_(shard)
        return handle

    def reduce_scatter(self, full: torch.Tensor, out: torch.Tensor, *, tag: int) -> Handle:
        """See `Collectives.reduce_scatter`."""
        if out.device.type != "cpu" and self.group.size() > 1:
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
            return Works([work], None, copy, keep=[wide, target])
        parts = list(full.view(self.group.size(), -1))
        return self.way().swap(parts, tag, then=lambda received: mean_of(received, out))

    def way(self) -> Messages | SharedMemory:
        """How parts travel on the CPU, agreed by all ranks at the first collective."""
        if self._way is None:
            shared = connect(self.group, self.timeout_s) if self.shared_memory else None
            self._way = shared or Messages(self.group, self.timeout_s)
        return self._way

    def trim(self) -> None:
        """See `Collectives.trim`."""
        if self._way is not None:
            self._way.trim()


def mean_of(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """`out` = the mean of `parts`, summed in rank order in fp32 (or wider), rounded once; `out` may be one of them."""
    if len(parts) == 1:
        if out.data_ptr() != parts[0].data_ptr():
            out.copy_(parts[0])
    elif len(parts) == 2 and parts[0].dtype == out.dtype != torch.float16:  # whose sum may overflow
        torch.add(parts[0], parts[1], out=out).mul_(0.5)
    else:
        wide = torch.promote_types(out.dtype, torch.float32)
        total = out if out.dtype == wide != parts[0].dtype else torch.empty_like(out, dtype=wide)
        total.copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        total.mul_(1.0 / len(parts))
        if total is not out:
            out.copy_(total)


def _tag(what: str, tensor: torch.Tensor | None = None) -> int:
    """31 bits that name a collective and, where ranks have tensors of one size, that size; alike on every rank."""
    size = "" if tensor is None else f" {tensor.numel()} {tensor.dtype}"
    return zlib.crc32(f"{what}{size}".encode()) & 0x7FFFFFFF
