"""How parts travel between CPU ranks of one machine: through memory that all of them map.

In: what goes to each rank, and a tag. Out: a handle; once it is done, what came from each rank. Says and keeps what
`exchange.Messages` does: parts with different tags never meet, and a wait ends at its deadline, or when its peer is
gone.

Note [Shared memory]
Each rank has a file in memory (memfd), which the others map: a ring of notes for each reader, then blocks. A rank
copies what it sends into a block and notes in the rings where. Who has read the block marks its `use` in the block's
head, and once all have it may be used again. The files have no name: they go with the last process that maps them,
however that ends. Two copies in memory cost less than the way through a socket, and no thread of a back end takes the
processor from the computation beside them. A rank that waits looks at the rings, and from time to time whether the
other still lives.
"""

from __future__ import annotations

import bisect
import mmap
import os
import select
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from .exchange import Then, exchange
from .memory_files import create, open_peer

_LINE_BYTES = 64
_ADDRESS_BYTES = 256
_LONGEST_NAP_S = 200e-6
_CHECK_S = 0.05
"""How often a rank that waits looks whether the others live."""


class Note(NamedTuple):
    """Where a part lies in its sender's file: `start` bytes into the `use`-th use of the block at `offset`."""

    tag: int
    offset: int
    nbytes: int
    start: int
    use: int


class Ring:
    """Notes from one rank to another, first in first out. One writes, one reads; no locks.

    Args:
        numbers: [8 (1 + SLOTS)] int64, zero at first. Line 0: how many notes the reader has taken, and whether the
            writer has gone, and 1 + the notes that the reader had taken when it began to wait for more; then a line a
            slot: 1 + the serial of its note, and the note.
    """

    SLOTS = 127

    def __init__(self, numbers: memoryview) -> None:
        self._numbers = numbers
        self._done = 0

    def post(self, note: Note) -> bool:
        """Write a note; False if the ring is full."""
        numbers, slot = self._numbers, 8 * (1 + self._done % self.SLOTS)
        if self._done - numbers[0] >= self.SLOTS:
            return False
        for place, number in enumerate(note, slot + 1):
            numbers[place] = number
        _fence()
        self._done += 1
        numbers[slot] = self._done
        return True

    def take(self) -> Note | None:
        """Read the next note; None if there is none yet."""
        numbers, slot = self._numbers, 8 * (1 + self._done % self.SLOTS)
        if numbers[slot] != self._done + 1:
            return None
        _fence()
        note = Note(*numbers[slot + 1 : slot + 6])
        _fence()
        self._done += 1
        numbers[0] = self._done
        return note

    @property
    def abandoned(self) -> bool:
        """Whether its writer has gone; notes may be left in it."""
        return bool(self._numbers[1])

    def abandon(self) -> None:
        """The writer goes."""
        self._numbers[1] = 1

    def wait_for_more(self) -> None:
        """The reader has taken every note that it has seen, and sends nothing until another comes."""
        self._numbers[2] = self._done + 1

    @property
    def is_awaited(self) -> bool:
        """Whether the reader has taken every note of this writer, and sends nothing until another comes."""
        return self._numbers[2] == self._done + 1


_RING_BYTES = 8 * 8 * (1 + Ring.SLOTS)


@dataclass
class _Block:
    """A part of a rank's file: a head where each reader notes the last use that it has read, then the payload."""

    offset: int
    nbytes: int
    use: int = 0


@dataclass
class Swap:
    """Parts on their way: a `collectives.Handle`."""

    way: SharedMemory
    tag: int
    sources: Sequence[int]
    finish: Callable[[list[Note]], None]

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank."""
        return not self.way.missing(self.tag, self.sources)

    def wait(self) -> None:
        """Finish."""
        self.finish(self.way.notes(self.tag, self.sources))


class SharedMemory:
    """The parts through memory that all ranks map; see Note [Shared memory].

    Blocks are kept for the next use: the parts that were under way at once, and on their way to slower readers.

    Args:
        group: the ranks.
        timeout_s: deadline of a wait.
        files: each rank's file.
        lives: each other rank's process, as a file (pidfd) that can be read when it has ended.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout_s: float, files: Sequence[int], lives: dict[int, int]
    ) -> None:
        self.group = group
        self.timeout_s = timeout_s
        self._rank = group.rank()
        self._files = files
        self._lives = lives
        self._maps: dict[int, tuple[mmap.mmap, memoryview]] = {}
        self._blocks: list[_Block] = []
        self._end = _RING_BYTES * group.size()
        self._outgoing = {reader: self._ring(self._rank, reader) for reader in lives}
        self._incoming = {writer: self._ring(writer, self._rank) for writer in lives}
        self._arrived: dict[tuple[int, int], deque[Note]] = {}  # (source, tag) -> notes, oldest first
        weakref.finalize(self, _leave, os.getpid(), list(self._outgoing.values()), [*files, *lives.values()])

    def swap(
        self,
        sent: Sequence[torch.Tensor],
        tag: int,
        *,
        into: Sequence[torch.Tensor] | None = None,
        then: Then | None = None,
    ) -> Swap:
        """See `Messages.swap`."""
        own = sent[self._rank]
        sources = list(self._incoming) if own.numel() else []
        if own.numel():
            self._send(sent, tag)

        def finish(notes: list[Note]) -> None:
            parts, heads = list(sent), []
            for source, note in zip(sources, notes, strict=True):
                memory, numbers = self._memory(source, note.offset + note.nbytes)
                parts[source] = _part(memory, note.offset + note.start, own)
                heads.append((numbers, note.offset // 8 + self._rank, note.use))
                if into is not None:
                    into[source].copy_(parts[source])
            if then is not None:
                then(parts if into is None else into)
            _fence()
            for numbers, place, use in heads:
                numbers[place] = use

        return Swap(self, tag, sources, finish)

    # -- sending ----------------------------------------------------------------------------------------------

    def _send(self, sent: Sequence[torch.Tensor], tag: int) -> None:
        """Copy what goes to other ranks into a block, and tell each where its part is."""
        # A gather sends the same to all.
        distinct = {sent[reader].data_ptr(): sent[reader] for reader in self._outgoing}
        own = sent[self._rank]
        stride, first = _whole_lines(own.numel() * own.element_size()), _whole_lines(8 * self.group.size())
        block = self._borrow(first + stride * len(distinct))
        memory, _ = self._memory(self._rank, block.offset + block.nbytes)
        starts = {}
        for position, (pointer, part) in enumerate(distinct.items()):
            starts[pointer] = first + position * stride
            _part(memory, block.offset + starts[pointer], part).copy_(part.view(-1))
        block.use += 1
        for reader in self._outgoing:
            self._post(
                reader, Note(tag, block.offset, block.nbytes, starts[sent[reader].data_ptr()], block.use)
            )

    def _post(self, reader: int, note: Note) -> None:
        self._wait(lambda: self._outgoing[reader].post(note), lambda: [reader], for_notes=False)

    def _borrow(self, nbytes: int) -> _Block:
        """The smallest block that is large enough and that every other rank has read, or a new one."""
        most = (
            mmap.PAGESIZE if nbytes <= mmap.PAGESIZE else self._end
        )  # a few numbers keep no large block busy
        for block in self._blocks:
            if nbytes <= block.nbytes <= most:
                numbers, head = self._memory(self._rank, block.offset + block.nbytes)[1], block.offset // 8
                if all(numbers[head + reader] == block.use for reader in self._outgoing):
                    return block
        nbytes += -nbytes % mmap.PAGESIZE
        _allocate(self._files[self._rank], self._end, nbytes)
        block = _Block(self._end, nbytes)
        self._end += nbytes
        bisect.insort(self._blocks, block, key=lambda block: block.nbytes)
        return block

    # -- receiving --------------------------------------------------------------------------------------------

    def missing(self, tag: int, sources: Iterable[int]) -> list[int]:
        """The sources whose part has not come."""
        self._collect()
        return [source for source in sources if not self._arrived.get((source, tag))]

    def notes(self, tag: int, sources: Iterable[int]) -> list[Note]:
        """The oldest part with `tag` from each source, as soon as all are there."""
        missing = partial(self.missing, tag, sources)
        self._wait(lambda: not missing(), missing, for_notes=True)
        found = [self._arrived[source, tag].popleft() for source in sources]
        for source in sources:
            if not self._arrived[source, tag]:
                del self._arrived[source, tag]
        return found

    def _collect(self) -> None:
        """Take all notes in."""
        for source, ring in self._incoming.items():
            while (note := ring.take()) is not None:
                self._arrived.setdefault((source, note.tag), deque()).append(note)

    def _wait(
        self, over: Callable[[], bool], waited_for: Callable[[], list[int]], *, for_notes: bool
    ) -> None:
        """Return when `over`; meanwhile take notes in, since others may wait for room in their rings."""
        start = checked = time.monotonic()
        nap = 0.0
        while not over():
            now = time.monotonic()
            if now - start > self.timeout_s:
                raise RuntimeError(f"rank {_listed(waited_for())} did not come within {self.timeout_s:g} s")
            if now - checked > _CHECK_S:
                checked = now
                gone = [rank for rank in waited_for() if self._is_gone(rank)]
                stuck = self._stuck(waited_for()) if for_notes else []
                if gone or stuck:
                    if over():  # what came in last may have been in between
                        return
                    if gone:
                        raise RuntimeError(f"rank {_listed(gone)} has ended")
                    raise RuntimeError(f"rank {_listed(stuck)} waits for this rank, and this rank for it")
            time.sleep(nap)
            nap = min(nap + 10e-6, _LONGEST_NAP_S)
            self._collect()

    def _stuck(self, waited_for: Iterable[int]) -> list[int]:
        """Tell the others that this rank waits for their next note; those of them that wait for one of this rank."""
        for rank in waited_for:
            self._incoming[rank].wait_for_more()
        return [rank for rank in waited_for if self._outgoing[rank].is_awaited]

    def _is_gone(self, rank: int) -> bool:
        poll = select.poll()
        poll.register(self._lives[rank], select.POLLIN)
        return self._incoming[rank].abandoned or bool(poll.poll(0))

    # -- memory -----------------------------------------------------------------------------------------------

    def _ring(self, writer: int, reader: int) -> Ring:
        start = _RING_BYTES * reader // 8
        return Ring(self._memory(writer, self._end)[1][start : start + _RING_BYTES // 8])

    def _memory(self, owner: int, stop: int) -> tuple[mmap.mmap, memoryview]:
        """A rank's file, as bytes and as int64, mapped at least up to `stop`; renewed when the file has grown."""
        if owner not in self._maps or len(self._maps[owner][0]) < stop:
            try:
                mapped = mmap.mmap(self._files[owner], os.fstat(self._files[owner]).st_size)
            except OSError as error:
                raise RuntimeError(
                    f"cannot map the memory that rank {owner} shares: {error.strerror}"
                ) from error
            self._maps[owner] = mapped, memoryview(mapped).cast("q")
        return self._maps[owner]

    def trim(self) -> None:
        """Keep the blocks: fresh pages at every pass would cost more than the copies."""


def connect(group: dist.ProcessGroup, timeout_s: float) -> SharedMemory | None:
    """Shared memory, where every rank of the group can map the files of all others; collective."""
    rank, size = group.rank(), group.size()
    if size == 1:
        return None
    own, address = create(_RING_BYTES * size)
    addresses = [torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8) for _ in range(size)]
    addresses[rank][: len(address)] = torch.tensor(list(address), dtype=torch.uint8)
    exchange(group, [addresses[rank]] * size, addresses, _tag("addresses"), timeout_s).wait()
    peers = {r: open_peer(bytes(addresses[r].tolist()).rstrip(b"\0")) for r in range(size) if r != rank}
    able = [torch.tensor([int(own is not None and None not in peers.values())]) for _ in range(size)]
    exchange(group, [able[rank]] * size, able, _tag("agreement on shared memory"), timeout_s).wait()
    found = {r: peer for r, peer in peers.items() if peer is not None}
    if own is not None and all(map(int, able)):
        files = [own if r == rank else found[r].file for r in range(size)]
        return SharedMemory(group, timeout_s, files, {r: peer.life for r, peer in found.items()})
    _leave(
        os.getpid(),
        [],
        [*([] if own is None else [own]), *(file for peer in found.values() for file in peer)],
    )
    return None


def _allocate(file: int, start: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(file, start, nbytes)  # or a later write would end the process
    except OSError as error:
        raise RuntimeError(f"no {nbytes} bytes of shared memory to be had: {error.strerror}") from error


def _leave(process: int, rings: Iterable[Ring], files: Iterable[int]) -> None:
    """Tell the readers, and close the files; not in a process that was forked off."""
    if os.getpid() == process:
        for ring in rings:
            ring.abandon()
        for file in files:
            os.close(file)


def _part(memory: mmap.mmap, start: int, like: torch.Tensor) -> torch.Tensor:
    """The bytes from `start`, as a flat tensor of the size and dtype of `like`."""
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)


_lock = threading.Lock()


def _fence() -> None:
    """Order what was read or written before it against what is written after it, for processors that reorder them."""
    for _ in range(2):
        with _lock:
            pass


def _whole_lines(nbytes: int) -> int:
    return nbytes + -nbytes % _LINE_BYTES


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _tag(what: str) -> int:
    return zlib.crc32(what.encode()) & 0x7FFFFFFF
