"""What a store has under way: writes that others must wait for, and tensors read ahead of their use.

In: transfers of `accel_kernels`. Out: when a range may be touched; values that are still in memory, or have been read.
Next: `nvme_store`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import accel_kernels as ak
import torch
from zero_core import Handle

from .drive_files import Place
from .errors import OffloadMemoryError
from .maps import host_empty


@dataclass(frozen=True)
class Writing:
    """Elements `start` to `stop` of a tensor on their way to the file.

    Attributes:
        dtype, offset: of them, the latter in the storage that the transfer keeps until somebody has waited for it.
    """

    start: int
    stop: int
    dtype: torch.dtype
    offset: int
    transfer: ak.Transfer

    def touches(self, start: int, stop: int) -> bool:
        """Whether a range has some of them."""
        return self.start < stop and start < self.stop

    def copy_to(self, out: torch.Tensor, start: int) -> bool:
        """Elements from `start` on; False if their memory is another's, or may have been before the copy had ended."""
        storage = self.transfer.memory
        if storage is None:
            return False
        here = self.offset + start - self.start
        values = torch.empty(0, dtype=self.dtype).set_(storage, here, (out.numel(),), (1,))
        out.copy_(values.view(out.shape))
        return not self.transfer.is_done()


class Writes:
    """By the names of their tensors. A write that failed stays known until its range is replaced.

    Args:
        limit_bytes: of values that are kept for them.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._of: dict[str, list[Writing]] = {}

    def names(self) -> list[str]:
        """Of tensors that may not have arrived."""
        return list(self._of)

    def touching(self, name: str, start: int, stop: int) -> list[Writing]:
        """Those of a range."""
        return [each for each in self._of.get(name, ()) if each.touches(start, stop)]

    def add(self, name: str, writing: Writing) -> None:
        """One has begun. Those that have ended are let go, and above the limit the oldest are waited for."""
        self._of.setdefault(name, []).append(writing)
        # A transfer keeps its values until somebody has waited for it.
        writes = [(each, writing) for each, its in self._of.items() for writing in its]
        held = sum(writing.transfer.nbytes for _, writing in writes)
        for each, writing in writes:
            if held > self._limit_bytes or writing.transfer.is_done():
                held -= writing.transfer.nbytes
                with suppress(ak.TransferError):  # told by what asks for its range
                    writing.transfer.wait()
                    self._of[each].remove(writing)
        self._of = {each: its for each, its in self._of.items() if its}

    def wait(self, name: str, start: int, stop: int, *, replaced: bool = False) -> None:
        """Return when nothing of a range is being written.

        A write that failed stays known, so that nobody reads what was there before it, until its range is `replaced`.

        Raises:
            accel_kernels.TransferError: one that is not wholly replaced has failed.
        """
        for writing in self.touching(name, start, stop):
            covered = replaced and start <= writing.start and writing.stop <= stop
            with suppress(*([ak.TransferError] if covered else [])):
                writing.transfer.wait()
            self._of[name].remove(writing)
        if not self._of.get(name, True):
            del self._of[name]

    def swap(self, name: str, other: str) -> None:
        """Each of two tensors has the other's name from now on."""
        first, second = self._of.pop(name, []), self._of.pop(other, [])
        self._of |= {each: its for each, its in ((other, first), (name, second)) if its}


class ReadAhead:
    """Whole tensors that are read before anybody asks for them.

    Args:
        engine: reads them.
        limit_bytes: of memory for them, memory that waits for the next ones included.
        pin: lock its pages, for copies to a device; else it is registered with the engine.
    """

    def __init__(self, engine: ak.TransferEngine, limit_bytes: int, *, pin: bool = False) -> None:
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._coming: dict[str, tuple[ak.Transfer, torch.Tensor]] = {}
        self._pin = pin
        # New pages cost as much as a copy. A device may still be copying from spare ones.
        self._spare: list[tuple[torch.Tensor, Handle]] = []

    def __contains__(self, name: str) -> bool:
        return name in self._coming

    def begin(self, name: str, place: Place) -> None:
        """Read a tensor, if there is room for it."""
        room = self._limit_bytes - sum(memory.numel() for _, memory in self._coming.values())
        if 0 < place.nbytes <= room:
            memory = self._memory(place.nbytes, room)
            self._coming[name] = self._engine.read(place.drive.file, place.offset, memory), memory

    def take(self, name: str) -> tuple[ak.Transfer, torch.Tensor]:
        """Its transfer and the bytes it reads into; `give` them back when they have been used."""
        return self._coming.pop(name)

    def give(self, memory: torch.Tensor, after: Handle) -> None:
        """For tensors to come, after the last copy from it."""
        self._spare.append((memory, after))

    def forget(self, name: str) -> None:
        """Nobody asks for it any more."""
        if name in self._coming:
            with suppress(ak.TransferError):
                self._coming.pop(name)[0].wait()

    def clear(self) -> None:
        """Give all memory back."""
        self._coming.clear()
        while self._spare:
            self._spare.pop()[1].wait()

    def _memory(self, nbytes: int, room: int) -> torch.Tensor:
        """So many bytes; spare ones, if there are any. No more than `room` bytes are spare or new."""
        for position, (memory, after) in enumerate(self._spare):
            if memory.numel() == nbytes:
                after.wait()
                del self._spare[position]
                return memory
        while self._spare and sum(each.numel() for each, _ in self._spare) + nbytes > room:
            self._spare.pop(0)[1].wait()
        if self._pin:
            with suppress(OffloadMemoryError):  # a hint cannot fail; copies of the values are slower then
                return host_empty(nbytes, "values that are read ahead", pin=True)
        return ak.aligned_empty(nbytes, register=self._engine)
