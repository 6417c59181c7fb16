"""The few words that ranks exchange about a checkpoint; the package's one user of torch.distributed.

Bytes travel as messages between CPUs (gloo). Every method is called by all ranks, in the same order; a rank that does
not come ends the wait of the others with an error that names it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import msgpack
import torch
import torch.distributed as dist

from .errors import CheckpointError

T = TypeVar("T")
U = TypeVar("U")
_SHORT = 4096
"""Bytes that travel with their size."""
_TAG = 0x636B  # of these messages; between two ranks they arrive in the order in which they were sent


class Ranks:
    """The ranks that save or load together.

    Args:
        group: their process group; None means all ranks where torch.distributed is initialised, else this process.
        own: make a group beside it, so that what is said here needs no common order with anything else.
        timeout_s: how long to wait for another rank.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, own: bool = False, timeout_s: float = 600.0
    ) -> None:
        self.rank, self.world, self.timeout_s = 0, 1, timeout_s
        self._group: dist.ProcessGroup | None = None
        if group is None and not dist.is_initialized():
            return
        group = group or dist.group.WORLD
        assert group is not None
        self.rank, self.world = group.rank(), group.size()
        if self.world > 1:
            self._group = _gloo_beside(group, timeout_s) if own or not _has_cpu(group) else group

    def close(self) -> None:
        """Let go of the group; nothing can be said any more."""
        self._group = None

    def gather_bytes(self, mine: bytes, doing: str) -> list[bytes]:
        """Every rank's bytes, in rank order: one message to each where all are short, two otherwise.

        Raises:
            CheckpointError: a rank has ended, or did not come in time.
        """
        if self.world == 1:
            return [mine]
        short = torch.frombuffer(bytearray(_head(mine)), dtype=torch.uint8)
        heads = [torch.empty_like(short) for _ in range(self.world)]
        self._exchange(short, heads, doing)
        heads[self.rank] = short
        found = [bytes(head.numpy()) for head in heads]
        sizes = [int.from_bytes(head[:8], "little") for head in found]
        if max(sizes) <= _SHORT:
            return [head[8 : 8 + size] for head, size in zip(found, sizes, strict=True)]
        sent = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)
        received = [torch.empty(max(1, size), dtype=torch.uint8) for size in sizes]
        self._exchange(sent, received, doing)
        received[self.rank] = sent
        return [bytes(r[:n].numpy()) for r, n in zip(received, sizes, strict=True)]

    def _exchange(self, sent: torch.Tensor, received: list[torch.Tensor], doing: str) -> None:
        """As messages: gloo finishes its collectives on a thread that may outlive the interpreter's tensors.

        A rank that is lost does not keep this one from the others: they are to hear who it was, not to wait for one
        who left early.
        """
        assert self._group is not None
        deadline = time.monotonic() + self.timeout_s
        works: list[tuple[Any, int]] = []
        lost: list[tuple[int, RuntimeError]] = []
        for step in range(1, self.world):
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            for call, tensor, peer in (
                (self._group.recv, received[source], source),
                (self._group.send, sent, to),
            ):
                try:
                    works.append((call([tensor], peer, _TAG), peer))
                except RuntimeError as error:  # noqa: PERF203 - each may be of another rank
                    lost.append((peer, error))
        for work, peer in works:
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:  # noqa: PERF203 - each may be of another rank
                lost.append((peer, error))
        if lost:
            peer, cause = lost[0]
            said = str(cause).splitlines()[0][:200]
            raise CheckpointError(
                f"{doing}: rank {peer} of {self.world} has ended or did not answer ({said})"
            ) from cause

    def gather(self, mine: Any, doing: str) -> list[Any]:
        """Every rank's value (what msgpack knows), in rank order.

        Raises:
            CheckpointError: as `gather_bytes`; or another rank is doing something else.
        """
        packed = self.gather_bytes(msgpack.packb([doing, mine]), doing)
        said = [msgpack.unpackb(each, strict_map_key=False) for each in packed]
        for rank, (its, _) in enumerate(said):
            if its != doing:
                raise CheckpointError(
                    f"rank {self.rank} is at {doing!r}, and rank {rank} at {its!r}; every rank makes the same calls in "
                    "the same order: after an error on some of them alone, start anew"
                )
        return [value for _, value in said]

    def together(self, doing: str, act: Callable[[], T]) -> T:
        """Do something on all ranks, and go on on all of them or none.

        Raises:
            BaseException: what `act` raised on this rank.
            CheckpointError: it raised on another.
        """
        return self.share(doing, act, lambda result: None)[0]

    @contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """What is raised in the block is what this rank has to say in the next `share` of the others."""
        try:
            yield
        except Exception as raised:
            failed: Future[None] = Future()
            failed.set_exception(raised)
            self.together(doing, failed.result)

    def gather_results(self, doing: str, act: Callable[[], T]) -> list[T]:
        """As `together`; returns every rank's result (what msgpack knows), in rank order."""
        return self.share(doing, act, lambda result: result)[1]

    def on_first(self, doing: str, act: Callable[[], T]) -> T:
        """Do something on the first rank; its result (what msgpack knows), or its failure, on all."""
        everyone: list[Any] = self.gather_results(doing, act if self.rank == 0 else lambda: None)
        return cast(T, everyone[0])

    def share(self, doing: str, act: Callable[[], T], tell: Callable[[T], U]) -> tuple[T, list[U]]:
        """As `together`; returns this rank's result, and what every rank tells of its own (what msgpack knows)."""
        error: BaseException | None = None
        said: list[Any] = ["", None]
        try:
            result = act()
            said[1] = tell(result)
        except Exception as raised:  # the others must hear of it
            error = raised
            said = [f"{type(error).__name__}: {error}", None]
        heard = self.gather(said, doing)
        if error is not None:
            raise error
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(heard) if text]
        if failed:
            raise CheckpointError(f"{doing} failed on another rank. {'; '.join(failed)}")
        return result, [each for _, each in heard]


def _head(mine: bytes) -> bytes:
    """The size, and as much of the bytes as a short message holds."""
    return (len(mine).to_bytes(8, "little") + mine[:_SHORT]).ljust(8 + _SHORT, b"\0")


def _gloo_beside(group: dist.ProcessGroup, timeout_s: float) -> dist.ProcessGroup:
    """A group of the same ranks, for CPUs.

    Not by `dist.new_group`: that one gives a new group the name of one that is gone, under which ranks may still find
    the old one's addresses.
    """
    members = ",".join(map(str, dist.get_process_group_ranks(group)))
    prefix = f"ckpt-universal/{hashlib.sha256(members.encode()).hexdigest()}"
    store = dist.distributed_c10d._get_default_store()
    number = store.add(f"{prefix}/made-by-{group.rank()}", 1)  # alike on all ranks: they make them together
    own = dist.distributed_c10d.PrefixStore(f"{prefix}/{number}", store)
    gloo = dist.ProcessGroupGloo(own, group.rank(), group.size(), timedelta(seconds=timeout_s))
    return cast(dist.ProcessGroup, gloo)  # a back end alone: it sends and receives as a group does


def _has_cpu(group: dist.ProcessGroup) -> bool:
    """Whether tensors of the CPU can travel in a group."""
    return any(device.type == "cpu" for device in group._device_types)
