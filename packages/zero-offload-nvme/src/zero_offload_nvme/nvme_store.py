"""Drives as a store: each tensor a range of a file, moved past the page cache by `accel_kernels.TransferEngine`.

In: flat tensors under names. Out: the same, read into memory that the caller brings. The files have no names in their
directories once they are open: they are gone when the process is, however it ends, and no two runs can meet in one.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

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

    def __init__(self, transfer: ak.Transfer, source: torch.Tensor | None, out: torch.Tensor) -> None:
        self._transfer, self._source, self._out = transfer, source, out

    def wait(self) -> None:
        self._transfer.wait()
        if self._source is not None:
            self._out.copy_(self._source)
            self._source = None

    def is_done(self) -> bool:
        return self._transfer.is_done()


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
        self._places: dict[str, _Place] = {}
        self._writes: list[tuple[str, ak.Transfer]] = []
        self._cache: dict[str, tuple[ak.Transfer, torch.Tensor]] = {}
        self._drives: list[_Drive] = []
        try:
            for each in paths:
                self._drives.append(_open(self.engine, os.fspath(each)))
        except BaseException:
            self.close()
            raise

    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        """Make a tensor of zeros; the file systems set its bytes aside now."""
        place = self._make(name, numel, dtype)
        if place.offset < place.drive.end - _pages(place.nbytes):  # a range that was used before
            self.view(name).zero_()

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> ak.Transfer | Done:
        """See `zero_core.ShardStore.put`."""
        place = self._places.get(name)
        if place is None:
            place = self._make(name, values.numel(), values.dtype)
        if not 0 <= start <= place.numel - values.numel() or values.dtype != place.dtype:
            raise OffloadStateError(
                f"NvmeStore: {name!r} has {place.numel} elements of {place.dtype}; got {values.numel()} of "
                f"{values.dtype} for element {start} on"
            )
        self.forget(name)
        if not values.numel():
            return DONE
        offset = place.offset + start * place.dtype.itemsize
        transfer = self.engine.write(place.drive.file, offset, values.detach().cpu().contiguous())
        self._writes.append((name, transfer))
        self._let_go_of_written()
        return transfer

    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> _Reading | Done:
        """See `zero_core.ShardStore.fetch`."""
        place = self._settled(name)
        if not out.numel():
            return DONE
        if name in self._cache and start == 0 and out.numel() == place.numel:
            transfer, memory = self._cache.pop(name)
            return _Reading(transfer, memory[: place.nbytes].view(place.dtype), out)
        offset = place.offset + start * place.dtype.itemsize
        if out.is_cpu and out.is_contiguous() and out.dtype == place.dtype:
            return _Reading(self.engine.read(place.drive.file, offset, out.detach()), None, out)
        memory = ak.aligned_empty(out.numel() * place.dtype.itemsize)
        transfer = self.engine.read(place.drive.file, offset, memory)
        return _Reading(transfer, memory.view(place.dtype), out)

    def prefetch(self, name: str) -> None:
        """See `zero_core.ShardStore.prefetch`; nothing where the cache is full."""
        if name in self._cache:
            return
        place = self._settled(name)
        held = sum(memory.numel() for _, memory in self._cache.values())
        if not place.nbytes or held + place.nbytes > self.cache_bytes:
            return
        memory = ak.aligned_empty(place.nbytes)
        self._cache[name] = self.engine.read(place.drive.file, place.offset, memory), memory

    def forget(self, name: str) -> None:
        """See `zero_core.ShardStore.forget`."""
        if name in self._cache:
            self._cache.pop(name)[0].wait()

    def view(self, name: str) -> torch.Tensor:
        """A map of the file, see Note [Views of a drive]; it outlives the store, and the file with it."""
        place = self._settled(name)
        if not place.numel:
            return torch.empty(0, dtype=place.dtype)
        mapped = mmap.mmap(place.drive.descriptor, place.nbytes, offset=place.offset)
        return torch.frombuffer(mapped, dtype=place.dtype)

    def release(self, name: str) -> None:
        """Keep it no longer; its range serves the next one of its size."""
        if name in self._places:
            self._settled(name)
            self.forget(name)
            place = self._places.pop(name)
            self.used_bytes -= _pages(place.nbytes)
            place.drive.free.setdefault(_pages(place.nbytes), []).append(place.offset)

    def flush(self) -> None:
        """Return when all that was put is in the files.

        Raises:
            accel_kernels.TransferError: some of it is not.
        """
        while self._writes:
            self._writes.pop(0)[1].wait()

    def close(self) -> None:
        """Let go of files and engine; views stay what they are."""
        with suppress(ak.TransferError):  # nobody will read it
            self.flush()
        self._cache.clear()
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

    def _settled(self, name: str) -> _Place:
        """Where a tensor is, once nothing of it is being written."""
        if name not in self._places:
            raise OffloadStateError(f"NvmeStore: nothing is kept under {name!r}")
        for write in [each for each in self._writes if each[0] == name]:
            self._writes.remove(write)
            write[1].wait()
        return self._places[name]

    def _let_go_of_written(self) -> None:
        """A transfer keeps its values until somebody has waited for it; at the limit the oldest is waited for."""
        for write in [each for each in self._writes if each[1].is_done()]:
            self._writes.remove(write)
            write[1].wait()
        while len(self._writes) > 1 and sum(each.nbytes for _, each in self._writes) > self.cache_bytes:
            self._writes.pop(0)[1].wait()

    def _make(self, name: str, numel: int, dtype: torch.dtype) -> _Place:
        nbytes = _pages(numel * dtype.itemsize)
        if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
            raise OffloadDiskError(
                errno.ENOSPC,
                f"NvmeStore: {name!r} needs {nbytes} bytes, and {self.limit_bytes - self.used_bytes} of "
                f"{self.limit_bytes} are free; raise limit_bytes",
            )
        drive = min(self._drives, key=lambda each: each.end - sum(n * len(at) for n, at in each.free.items()))
        if drive.free.get(nbytes):
            offset = drive.free[nbytes].pop()
        else:
            offset = drive.end
            _grow(drive, nbytes, name)
        self._places[name] = _Place(drive, offset, numel, dtype)
        self.used_bytes += nbytes
        return self._places[name]


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
            f"NvmeStore: {directory}: {error.strerror or error}; choose a directory that this process may write to",
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
        free = shutil.disk_usage(drive.directory).free
        raise OffloadDiskError(
            error.errno or errno.EIO,
            f"NvmeStore: {drive.directory}: {name!r} needs {nbytes} bytes, and {free} are free there: "
            f"{error.strerror}; make room, or choose another drive",
        ) from error
    drive.end += nbytes
