"""How parts travel between CPU ranks: as tagged messages, or through memory that the ranks of one machine share.

In: what goes to each rank, and a tag. Out: a handle; once it is done, what came from each rank. `collectives` makes
gathers and reductions of it. Parts with different tags never meet, and a wait ends at its deadline, on both ways.

Note [Shared memory]
A rank copies what it sends into a block of a file in memory (memfd) that the others map, and sends each of them a
message of 32 bytes that says where. Who has read the block notes its `use` in the block's head, and once all have the
block may be used again. The files have no name: they go with the last process that maps them, however that ends.
The messages give deadlines and order, as if the parts themselves had travelled. Two copies in memory cost less than
the way through a socket, and no other thread takes the processor from the computation beside them.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue

import torch
import torch.distributed as dist

Then = Callable[[Sequence[torch.Tensor]], object]
_LINE_BYTES = 64
_ADDRESS_BYTES = 256


@dataclass
class Works:
    """Works of the process group, then something to do with what arrived: a `collectives.Handle`.

    A time-out of None leaves the deadline to the back end. `keep` holds what must outlive the works. `arrival` is
    there where a `Watcher` waits for the works.
    """

    works: Sequence[dist.Work]
    timeout_s: float | None
    then: Callable[[], object] | None = None
    keep: Sequence[torch.Tensor] = field(default_factory=list)
    arrival: Future[None] | None = None

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank, as far as is known."""
        return self.arrival is None or self.arrival.done()

    def wait(self) -> None:
        """Finish."""
        if self.arrival is None:
            self.arrive()
        else:
            self.arrival.result()
        if self.then is not None:
            self.then()

    def arrive(self) -> None:
        """Wait for the works alone."""
        for work in self.works:
            if self.timeout_s is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout_s))


class Watcher:
    """A thread that waits for works, so that their rank may go on serving others; gloo's works cannot be asked."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Works | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._queue.put, None)

    def watch(self, works: Works) -> None:
        """Have `works.is_done()` tell."""
        works.arrival = Future()
        self._queue.put(works)
        if self._thread is None:
            self._thread = threading.Thread(target=_watch, args=(self._queue,), name="zero_core", daemon=True)
            self._thread.start()


def _watch(queue: SimpleQueue[Works | None]) -> None:
    while (works := queue.get()) is not None:
        assert works.arrival is not None
        try:
            works.arrive()
        except BaseException as error:  # the rank that waits raises it
            works.arrival.set_exception(error)
        else:
            works.arrival.set_result(None)
        del works


def exchange(
    group: dist.ProcessGroup,
    sent: Sequence[torch.Tensor],
    received: Sequence[torch.Tensor],
    tag: int,
    timeout_s: float,
    then: Callable[[], object] | None = None,
) -> Works:
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
            works.append(dist.irecv(as_bytes(received[source]), from_rank, group=group, tag=tag))
        if sent[peer].numel():
            works.append(
                dist.isend(as_bytes(sent[peer]), dist.get_global_rank(group, peer), group=group, tag=tag)
            )
    return Works([work for work in works if work is not None], timeout_s, then, [*sent, *received])


class Messages:
    """The parts themselves as messages; works between any ranks."""

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self._scratch: list[torch.Tensor] = []

    def swap(
        self,
        sent: Sequence[torch.Tensor],
        tag: int,
        *,
        into: Sequence[torch.Tensor] | None = None,
        then: Then | None = None,
    ) -> Works:
        """Exchange equal parts with every other rank.

        Args:
            sent: what goes to each rank; contiguous, of one size and dtype.
            tag: of these parts.
            into: where to put what comes from each rank; None keeps it until `then` returns.
            then: called with what came from each rank (this rank's own entry: what it would have sent itself).
        """
        rank, size = self.group.rank(), self.group.size()
        if into is not None:
            return exchange(
                self.group, sent, into, tag, self.timeout_s, None if then is None else lambda: then(into)
            )
        nbytes = sent[rank].numel() * sent[rank].element_size() * (size - 1)
        scratch = self._borrow(nbytes)
        parts = list(scratch[:nbytes].view(sent[rank].dtype).view(size - 1, -1)) if size > 1 else []
        received = [*parts[:rank], sent[rank], *parts[rank:]]

        def finish() -> None:
            if then is not None:
                then(received)
            self._scratch.append(scratch)

        return exchange(self.group, sent, received, tag, self.timeout_s, finish)

    def _borrow(self, nbytes: int) -> torch.Tensor:
        """Bytes for what arrives; kept between exchanges, since fresh pages cost more than the copy."""
        for position, buffer in enumerate(self._scratch):
            if buffer.numel() >= nbytes:
                return self._scratch.pop(position)
        return torch.empty(nbytes, dtype=torch.uint8)

    def trim(self) -> None:
        """Give scratch memory back."""
        self._scratch.clear()


@dataclass
class _Block:
    """A part of a rank's file: a head where each reader notes the last use that it has read, then the payload."""

    offset: int
    nbytes: int
    use: int = 0


class SharedMemory:
    """The parts through memory that all ranks map, a message to say where; see Note [Shared memory].

    Blocks are kept for the next use: the parts that were under way at once, and on their way to slower readers.
    """

    def __init__(self, messages: Messages, files: Sequence[int]) -> None:
        self.group = messages.group
        self.timeout_s = messages.timeout_s
        self._files = files
        self._maps: dict[int, mmap.mmap] = {}
        self._blocks: list[_Block] = []
        for file in files:
            weakref.finalize(self, os.close, file)

    def swap(
        self,
        sent: Sequence[torch.Tensor],
        tag: int,
        *,
        into: Sequence[torch.Tensor] | None = None,
        then: Then | None = None,
    ) -> Works:
        """See `Messages.swap`."""
        rank, size = self.group.rank(), self.group.size()
        if sent[rank].numel() == 0:
            return Works([], None, None if then is None else lambda: then(sent))
        block, starts = self._write(sent)
        notes = [torch.tensor([block.offset, block.nbytes, start, block.use]) for start in starts]
        found = [torch.empty_like(note) for note in notes]

        def finish() -> None:
            parts, heads = list(sent), []
            for source in range(size):
                if source != rank:
                    offset, nbytes, start, use = found[source].tolist()
                    memory = self._memory(source, offset + nbytes)
                    parts[source] = _part(memory, offset + start, sent[rank])
                    heads.append((_head(memory, offset, size), use))
                    if into is not None:
                        into[source].copy_(parts[source])
            if then is not None:
                then(parts if into is None else into)
            _fence()
            for head, use in heads:
                head[rank] = use

        return exchange(self.group, notes, found, tag, self.timeout_s, finish)

    def _write(self, sent: Sequence[torch.Tensor]) -> tuple[_Block, list[int]]:
        """Copy what goes to other ranks into a block; returns where each rank's part starts in it."""
        rank, size = self.group.rank(), self.group.size()
        # A gather sends the same to all.
        distinct = {part.data_ptr(): part for r, part in enumerate(sent) if r != rank}
        stride = _whole_lines(sent[rank].numel() * sent[rank].element_size())
        first = _whole_lines(8 * size)
        block = self._borrow(first + stride * len(distinct))
        memory = self._memory(rank, block.offset + block.nbytes)
        where = {}
        for position, (pointer, part) in enumerate(distinct.items()):
            where[pointer] = first + position * stride
            _part(memory, block.offset + where[pointer], part).copy_(part.view(-1))
        block.use += 1
        return block, [where.get(part.data_ptr(), 0) for part in sent]

    def _borrow(self, nbytes: int) -> _Block:
        """The smallest block that is large enough and that every other rank has read, or a new one."""
        rank = self.group.rank()
        for block in sorted(self._blocks, key=lambda block: block.nbytes):
            if block.nbytes >= nbytes:
                head = _head(self._memory(rank, block.offset + block.nbytes), block.offset, self.group.size())
                if all(use == block.use for reader, use in enumerate(head.tolist()) if reader != rank):
                    return block
        offset = sum(block.nbytes for block in self._blocks)
        nbytes += -nbytes % mmap.PAGESIZE
        try:
            os.posix_fallocate(self._files[rank], offset, nbytes)  # or a later write would end the process
        except OSError as error:
            raise RuntimeError(f"no {nbytes} bytes of shared memory to be had: {error.strerror}") from error
        self._blocks.append(_Block(offset, nbytes))
        return self._blocks[-1]

    def _memory(self, owner: int, stop: int) -> mmap.mmap:
        """A rank's file, mapped at least up to `stop`; one mapping a file, renewed when the file has grown."""
        if owner not in self._maps or len(self._maps[owner]) < stop:
            try:
                self._maps[owner] = mmap.mmap(self._files[owner], os.fstat(self._files[owner]).st_size)
            except OSError as error:
                raise RuntimeError(
                    f"cannot map the memory that rank {owner} shares: {error.strerror}"
                ) from error
        return self._maps[owner]

    def trim(self) -> None:
        """Keep the blocks: fresh pages at every pass would cost more than the copies."""


def _head(memory: mmap.mmap, offset: int, world_size: int) -> torch.Tensor:
    """[world_size] int64: for each reader, the last use of the block that it has read."""
    return torch.frombuffer(memory, dtype=torch.int64, count=world_size, offset=offset)


def _part(memory: mmap.mmap, start: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes from `start`, as a flat tensor of the size and dtype of `like`."""
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)


def connect(group: dist.ProcessGroup, timeout_s: float) -> Messages | SharedMemory:
    """Shared memory where every rank of the group can map the files of all others, else messages; collective."""
    messages = Messages(group, timeout_s)
    rank, size = group.rank(), group.size()
    if size == 1:
        return messages
    own, address = _create()
    addresses = [torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8) for _ in range(size)]
    addresses[rank][: len(address)] = torch.tensor(list(address), dtype=torch.uint8)
    exchange(group, [addresses[rank]] * size, addresses, _tag("addresses"), timeout_s).wait()
    files = [own if r == rank else _open(bytes(addresses[r].tolist()).rstrip(b"\0")) for r in range(size)]
    able = [torch.tensor([int(None not in files)]) for _ in range(size)]
    exchange(group, [able[rank]] * size, able, _tag("agreement on shared memory"), timeout_s).wait()
    found = [file for file in files if file is not None]
    if all(map(int, able)):
        return SharedMemory(messages, found)
    for file in found:
        os.close(file)
    return messages


def _create() -> tuple[int | None, bytes]:
    """A new file in memory, and the address under which other processes of this machine find it."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return None, b""
    name = f"zero_core-{secrets.token_hex(8)}"
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        file = os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError:  # a sandbox that allows neither
        return None, b""
    return file, f"{machine} /proc/{os.getpid()}/fd/{file} /memfd:{name}".encode()


def _open(address: bytes) -> int | None:
    """The file at an address of `_create`; None where it is on another machine, or cannot be opened or is another's."""
    try:
        machine, path, name = address.decode().split(" ")
        if machine != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return None
        if not os.readlink(path).startswith(name):  # the number of a process in another namespace
            return None
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None


_lock = threading.Lock()


def _fence() -> None:
    """Order what was read before it against what is written after it, for processors that reorder the two."""
    for _ in range(2):
        with _lock:
            pass


def _whole_lines(nbytes: int) -> int:
    return nbytes + -nbytes % _LINE_BYTES


def _tag(what: str) -> int:
    return zlib.crc32(what.encode()) & 0x7FFFFFFF


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: what travels is moved, not interpreted."""
    return tensor.detach().view(-1).view(torch.uint8)
