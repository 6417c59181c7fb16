"""Drives as a store: each tensor a range of a file, moved past the page cache by `accel_kernels.TransferEngine`.

In: flat tensors under names. Out: the same, read into memory that the caller brings. The files have no names in their
directories once they are open: they are gone when the process is, however it ends, and no two runs can meet in one.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import accel_kernels as ak
import torch

from .errors import OffloadDiskError, OffloadStateError
from .host_store import DONE, Done

PAGE = mmap.ALLOCATIONGRANULARITY

# Note [Views of a drive]
# `view` maps a tensor's range of the file. The kernel keeps such a map and reads and writes past the page cache agreed,
# one after the other: before a direct read it writes back what was changed through the map, and after a direct write
# it drops the pages. So whoever is in no hurry (checkpoints, `get_full`, a load) uses the tensor like any other.


@dataclass
class _Drive:
    """One file, and how far it is used.

    Attributes:
        free: ranges given back: size -> offsets.
    """

    directory: str
    file: ak.TransferFile
    descriptor: int
    end: int
    free: dict[int, list[int]]

    @property
    def used(self) -> int:
        return self.end - sum(nbytes * len(offsets) for nbytes, offsets in self.free.items())


@dataclass(frozen=True)
class _Writing:
    """Elements `start` to `stop` of a tensor on their way to the file."""

    start: int
    stop: int
    transfer: ak.Transfer

    def touches(self, start: int, stop: int) -> bool:
        return self.start < stop and start < self.stop


@dataclass(frozen=True)
class _Place:
    drive: _Drive
    offset: int
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Reading:
    """A read into memory, then a copy to where the values are wanted."""

    def __init__(
        self,
        transfer: ak.Transfer,
        source: torch.Tensor | None,
        out: torch.Tensor,
        done: Callable[[], None] | None = None,
    ) -> None:
        self._transfer, self._source, self._out, self._done = transfer, source, out, done

    def wait(self) -> None:
        self._transfer.wait()
        if self._source is not None:
            self._out.copy_(self._source)
            self._source = None
            if self._done is not None:
                self._done()

    def is_done(self) -> bool:
        return self._transfer.is_done()


P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(method: Callable[Concatenate[NvmeStore, P], T]) -> Callable[Concatenate[NvmeStore, P], T]:
    """Several threads may use a store; their bytes travel side by side all the same."""

    @wraps(method)
    def call(self: NvmeStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class NvmeStore:
    """Keeps flat tensors on drives; a `zero_core.ShardStore`.

    Args:
        path: a directory, or several on as many drives: tensors go to the one with the least on it.
        limit_bytes: more than that is refused; None: what the file systems have free.
        cache_bytes: of tensors that `prefetch` may bring to memory ahead of their `fetch`, and of values on their way
            to the drive, for each.
        engine: moves the bytes; None makes one. `accel_kernels.tune(path)` finds what suits a drive.

    Raises:
        OffloadDiskError: a directory cannot be written, or a file system is full; names path, bytes wanted and free.
            Nothing has changed then.
        accel_kernels.TransferError: bytes did not get through; names file, offset and bytes. A write that failed is
            told by whatever next asks for its range, again and again until the range is put anew or released.

    Bytes per rank: on the drives, what is put, in pages; in memory `cache_bytes`, and what callers bring.
    """

    in_memory = False

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        limit_bytes: int | None = None,
        cache_bytes: int = 256 << 20,
        engine: ak.TransferEngine | None = None,
    ) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        self.limit_bytes = limit_bytes
        self.cache_bytes = cache_bytes
        self.used_bytes = 0
        self._own_engine = engine is None
        self.engine = engine or ak.TransferEngine()
        self._lock = threading.RLock()
        self._places: dict[str, _Place] = {}
        self._writes: dict[str, list[_Writing]] = {}
        self._cache: dict[str, tuple[ak.Transfer, torch.Tensor]] = {}
        self._spare: list[torch.Tensor] = []  # that was in it: new pages cost as much as a copy
        self._drives: list[_Drive] = []
        try:
            for each in paths:
                self._drives.append(_open(self.engine, os.fspath(each)))
        except BaseException:
            self.close()
            raise

    @_one_at_a_time
    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        """Make a tensor of zeros; the file systems set its bytes aside now."""
        end = {drive.directory: drive.end for drive in self._drives}
        place = self._make(name, numel, dtype)
        if place.offset < end[place.drive.directory]:  # a range that was used before
            self.view(name).zero_()

    @_one_at_a_time
    def put(self, name: str, values: torch.Tensor, start: int = 0) -> ak.Transfer | Done:
        """See `zero_core.ShardStore.put`."""
        if name not in self._places and not start:
            self._make(name, values.numel(), values.dtype)
        place = self._place(name)
        _check_range(name, place, values, start, same_dtype=True)
        self.forget(name)
        if not values.numel():
            return DONE
        offset = place.offset + start * place.dtype.itemsize
        stop = start + values.numel()
        # The engine ends writes in any order; what is wholly replaced need not have arrived.
        self._wait(name, start, stop, replaced=True)
        transfer = self.engine.write(place.drive.file, offset, values.detach().cpu().contiguous())
        self._writes.setdefault(name, []).append(_Writing(start, stop, transfer))
        self._let_go_of_written()
        return transfer

    @_one_at_a_time
    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> _Reading | Done:
        """See `zero_core.ShardStore.fetch`."""
        place = self._place(name)
        _check_range(name, place, out, start)
        if not out.numel():
            return DONE
        self._wait(name, start, start + out.numel())
        if name in self._cache and start == 0 and out.numel() == place.numel:
            transfer, memory = self._cache.pop(name)
            values = memory[: place.nbytes].view(place.dtype)
            return _Reading(transfer, values, out, lambda: self._spare.append(memory))
        offset = place.offset + start * place.dtype.itemsize
        if out.is_cpu and out.is_contiguous() and out.dtype == place.dtype:
            return _Reading(self.engine.read(place.drive.file, offset, out.detach()), None, out)
        memory = ak.aligned_empty(out.numel() * place.dtype.itemsize)
        transfer = self.engine.read(place.drive.file, offset, memory)
        return _Reading(transfer, memory.view(place.dtype), out)

    @_one_at_a_time
    def prefetch(self, name: str) -> None:
        """See `zero_core.ShardStore.prefetch`; nothing where the cache is full."""
        if name in self._cache:
            return
        place = self._settled(name)
        held = sum(memory.numel() for _, memory in self._cache.values())
        if not place.nbytes or held + place.nbytes > self.cache_bytes:
            return
        memory = self._memory(place.nbytes, self.cache_bytes - held)
        self._cache[name] = self.engine.read(place.drive.file, place.offset, memory), memory

    @_one_at_a_time
    def forget(self, name: str) -> None:
        """See `zero_core.ShardStore.forget`."""
        if name in self._cache:
            with suppress(ak.TransferError):  # nobody asks for it any more
                self._cache.pop(name)[0].wait()

    @_one_at_a_time
    def view(self, name: str) -> torch.Tensor:
        """A map of the file, see Note [Views of a drive]; it outlives the store, and the file with it.

        Between a `prefetch` and its `fetch`, write to a map after `forget`: what is in memory would not show it.
        """
        self.forget(name)
        place = self._settled(name)
        if not place.numel:
            return torch.empty(0, dtype=place.dtype)
        mapped = mmap.mmap(place.drive.descriptor, place.nbytes, offset=place.offset)
        return torch.frombuffer(mapped, dtype=place.dtype)

    @_one_at_a_time
    def release(self, name: str) -> None:
        """Keep it no longer; its range serves the next one of its size."""
        if name in self._places:
            self.forget(name)
            place = self._places[name]
            self._wait(name, 0, place.numel, replaced=True)
            del self._places[name]
            self.used_bytes -= _pages(place.nbytes)
            place.drive.free.setdefault(_pages(place.nbytes), []).append(place.offset)

    @_one_at_a_time
    def swap(self, name: str, other: str) -> None:
        """Have each of two tensors under the other's name from now on; nothing is moved, views stay what they are."""
        first, second = self._place(name), self._place(other)
        for each in (name, other):
            self.forget(each)
        self._places[name], self._places[other] = second, first
        writes = self._writes.pop(name, []), self._writes.pop(other, [])
        for each, its in zip((other, name), writes, strict=True):
            if its:
                self._writes[each] = its

    @_one_at_a_time
    def flush(self) -> None:
        """Return when all that was put is in the files.

        Raises:
            accel_kernels.TransferError: some of it is not.
        """
        for name in list(self._writes):
            self._settled(name)

    @_one_at_a_time
    def close(self) -> None:
        """Let go of files and engine; views stay what they are."""
        for name, place in self._places.items():  # nobody will read it
            self._wait(name, 0, place.numel, replaced=True)
        self._cache.clear()
        self._spare.clear()
        self._places.clear()
        for drive in self._drives:
            drive.file.close()
            os.close(drive.descriptor)
        self._drives.clear()
        if self._own_engine:
            self.engine.close()

    def __enter__(self) -> NvmeStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _memory(self, nbytes: int, room: int) -> torch.Tensor:
        """So many bytes; spare ones, if there are any. No more than `room` bytes are spare or new."""
        for position, memory in enumerate(self._spare):
            if memory.numel() == nbytes:
                return self._spare.pop(position)
        while self._spare and sum(each.numel() for each in self._spare) + nbytes > room:
            self._spare.pop(0)
        return ak.aligned_empty(nbytes)

    def _place(self, name: str) -> _Place:
        if not self._drives:
            raise OffloadStateError(f"NvmeStore: {name!r}: the store is closed; make a new one")
        if name not in self._places:
            raise OffloadStateError(f"NvmeStore: nothing is kept under {name!r}")
        return self._places[name]

    def _settled(self, name: str) -> _Place:
        """Where a tensor is, once nothing of it is being written."""
        place = self._place(name)
        self._wait(name, 0, place.numel)
        return place

    def _wait(self, name: str, start: int, stop: int, *, replaced: bool = False) -> None:
        """Return when nothing of a range is being written.

        A write that failed stays known, so that nobody reads what was there before it, until its range is `replaced`.
        """
        for writing in list(self._writes.get(name, ())):
            if not writing.touches(start, stop):
                continue
            covered = replaced and start <= writing.start and writing.stop <= stop
            with suppress(*([ak.TransferError] if covered else [])):
                writing.transfer.wait()
            self._writes[name].remove(writing)
        if not self._writes.get(name, True):
            del self._writes[name]

    def _let_go_of_written(self) -> None:
        """A transfer keeps its values until somebody has waited for it; above the limit they are waited for."""
        writes = [(name, writing) for name, each in self._writes.items() for writing in each]
        held = sum(writing.transfer.nbytes for _, writing in writes)
        for name, writing in writes:
            if held > self.cache_bytes or writing.transfer.is_done():
                held -= writing.transfer.nbytes
                with suppress(ak.TransferError):  # told by what asks for its range
                    writing.transfer.wait()
                    self._writes[name].remove(writing)
        self._writes = {name: each for name, each in self._writes.items() if each}

    def _make(self, name: str, numel: int, dtype: torch.dtype) -> _Place:
        if not self._drives:
            raise OffloadStateError(f"NvmeStore: {name!r}: the store is closed; make a new one")
        if name in self._places:
            raise OffloadStateError(f"NvmeStore: {name!r} is there already; release it first")
        nbytes = _pages(numel * dtype.itemsize)
        if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
            raise OffloadDiskError(
                errno.ENOSPC,
                f"NvmeStore: {name!r} needs {nbytes} bytes, and {self.limit_bytes - self.used_bytes} of "
                f"{self.limit_bytes} are free; raise limit_bytes",
            )
        drive, offset = self._room_for(name, nbytes)
        place = self._places[name] = _Place(drive, offset, numel, dtype)
        self.used_bytes += nbytes
        return place

    def _room_for(self, name: str, nbytes: int) -> tuple[_Drive, int]:
        """On the drive with the least on it that has room."""
        drives = sorted(self._drives, key=lambda each: each.used)
        for drive in drives:
            if drive.free.get(nbytes):
                return drive, drive.free[nbytes].pop()
            offset = drive.end
            try:
                _grow(drive, nbytes, name)
            except OffloadDiskError:
                if drive is drives[-1]:
                    raise
            else:
                return drive, offset
        raise AssertionError("a store has a drive")


def _check_range(
    name: str, place: _Place, values: torch.Tensor, start: int, *, same_dtype: bool = False
) -> None:
    wrong_dtype = same_dtype and values.dtype != place.dtype
    if not 0 <= start <= place.numel - values.numel() or wrong_dtype:
        raise OffloadStateError(
            f"NvmeStore: {name!r} has {place.numel} elements of {place.dtype}; got {values.numel()} of "
            f"{values.dtype} for element {start} on"
        )


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _open(engine: ak.TransferEngine, directory: str) -> _Drive:
    path = os.path.join(directory, f".zero-offload-{secrets.token_hex(8)}")
    try:
        os.makedirs(directory, exist_ok=True)
        file = engine.open(path, nbytes=0)
        try:
            descriptor = os.open(path, os.O_RDWR)
        finally:
            os.unlink(path)
    except OSError as error:
        raise OffloadDiskError(
            error.errno or errno.EIO,
            f"NvmeStore: {directory}: {os.strerror(error.errno or errno.EIO)}; choose a directory that this process "
            "may write to",
        ) from error
    return _Drive(directory, file, descriptor, 0, {})


def _grow(drive: _Drive, nbytes: int, name: str) -> None:
    """Have the file system set bytes aside at the end of the file."""
    if not nbytes:
        return
    try:
        os.posix_fallocate(drive.descriptor, drive.end, nbytes)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(drive.descriptor, drive.end)
        at = os.fstatvfs(drive.descriptor)
        free = at.f_bavail * at.f_frsize
        raise OffloadDiskError(
            error.errno or errno.EIO,
            f"NvmeStore: {drive.directory}: {name!r} needs {nbytes} bytes, and {free} are free there: "
            f"{error.strerror}; make room, or choose another drive",
        ) from error
    drive.end += nbytes
