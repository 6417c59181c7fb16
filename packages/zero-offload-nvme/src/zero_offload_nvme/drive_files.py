"""Where a store's tensors lie: each a range of one file per drive.

In: names, sizes, dtypes. Out: a `Place` for each, with its bytes set aside by the file system. The files have no names
in their directories once they are open: they are gone when the process is, however it ends, and no two runs can meet in
one. Next: `nvme_store` moves the bytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import accel_kernels as ak
import torch

from .errors import OffloadDiskError, OffloadStateError
from .maps import file_map

PAGE = mmap.ALLOCATIONGRANULARITY


@dataclass
class Drive:
    """One file, and how far it is used; what it takes of the drive is free again once nobody holds this.

    Attributes:
        end: of the bytes that are set aside.
        free: ranges given back, none beside another: offset -> size.
    """

    directory: str
    file: ak.TransferFile
    descriptor: int
    end: int = 0
    free: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Let go of the file; maps stay what they are."""
        self.file.close()
        self._close_descriptor()

    @property
    def used(self) -> int:
        """Bytes of tensors."""
        return self.end - sum(self.free.values())

    def take(self, nbytes: int) -> int | None:
        """Offset of the smallest free range that is large enough, of which the rest stays free; None: there is none."""
        fitting = [(size, offset) for offset, size in self.free.items() if size >= nbytes]
        if not fitting:
            return None
        size, offset = min(fitting)
        del self.free[offset]
        if size > nbytes:
            self.free[offset + nbytes] = size - nbytes
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """A range is free, together with those beside it."""
        if not nbytes:
            return
        for start, size in list(self.free.items()):
            if start + size == offset or offset + nbytes == start:
                del self.free[start]
                offset, nbytes = min(offset, start), nbytes + size
        self.free[offset] = nbytes

    @property
    def tail(self) -> int:
        """Where the free range at the end begins."""
        return next((offset for offset, size in self.free.items() if offset + size == self.end), self.end)


@dataclass(frozen=True)
class Place:
    """A tensor's range of a file.

    Attributes:
        is_fresh: no tensor was there before; the file system says that it reads as zeros.
    """

    drive: Drive
    offset: int
    numel: int
    dtype: torch.dtype
    is_fresh: bool

    @property
    def nbytes(self) -> int:
        """Of the tensor; the range is of whole pages."""
        return self.numel * self.dtype.itemsize

    def offset_of(self, element: int) -> int:
        """In the file, in bytes."""
        return self.offset + element * self.dtype.itemsize

    def check(self, name: str, values: torch.Tensor, start: int, *, same_dtype: bool = False) -> None:
        """Refuse values that are not elements of this tensor from `start` on."""
        wrong_dtype = same_dtype and values.dtype != self.dtype
        if not 0 <= start <= self.numel - values.numel() or wrong_dtype:
            raise OffloadStateError(
                f"NvmeStore: {name!r} has {self.numel} elements of {self.dtype}; got {values.numel()} of "
                f"{values.dtype} for element {start} on"
            )

    def view(self) -> torch.Tensor:
        """A map of the range."""
        if not self.numel:
            return torch.empty(0, dtype=self.dtype)
        return file_map(self.drive.descriptor, self.offset, self.numel, self.dtype)


class DriveFiles:
    """Files on drives, and which tensor is where.

    Args:
        engine: opens the files.
        directories: one on each drive; made if need be.
        limit_bytes: more than that is never set aside; None: what the file systems have free.

    Attributes:
        used_bytes: of tensors, in pages.

    Raises:
        OffloadDiskError: a directory cannot be written; nothing stays open.
    """

    def __init__(
        self, engine: ak.TransferEngine, directories: Sequence[str], limit_bytes: int | None
    ) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._places: dict[str, Place] = {}
        self._drives: list[Drive] = []
        try:
            for directory in directories:
                self._drives.append(_open(engine, directory))
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Place:
        self._check_open(name)
        if name not in self._places:
            raise OffloadStateError(f"NvmeStore: nothing is kept under {name!r}")
        return self._places[name]

    def items(self) -> list[tuple[str, Place]]:
        """Names, and where they are."""
        return list(self._places.items())

    def add(self, name: str, numel: int, dtype: torch.dtype) -> Place:
        """Set bytes aside, on the drive with the least on it that has room.

        Raises:
            OffloadDiskError: there is none; names path, bytes wanted and free. Nothing has changed.
        """
        self._check_open(name)
        if name in self._places:
            raise OffloadStateError(f"NvmeStore: {name!r} is there already; release it first")
        nbytes = _pages(numel * dtype.itemsize)
        drive, offset, is_fresh = self._room_for(name, nbytes)
        self._places[name] = place = Place(drive, offset, numel, dtype, is_fresh)
        self.used_bytes += nbytes
        return place

    def remove(self, name: str) -> None:
        """Its range serves other tensors."""
        place = self._places.pop(name)
        nbytes = _pages(place.nbytes)
        self.used_bytes -= nbytes
        place.drive.give_back(place.offset, nbytes)

    def swap(self, name: str, other: str) -> None:
        """Each of two tensors has the other's name from now on."""
        self._places[name], self._places[other] = self[other], self[name]

    def close(self) -> None:
        """Let go of the files; views stay what they are."""
        self._places.clear()
        for drive in self._drives:
            drive.close()
        self._drives.clear()

    def _room_for(self, name: str, nbytes: int) -> tuple[Drive, int, bool]:
        """Drive and offset of a range, and whether no tensor was there before."""
        drives = sorted(self._drives, key=lambda each: each.used)
        if not nbytes:
            return drives[0], drives[0].end, True
        for drive in drives:
            found = drive.take(nbytes)
            if found is not None:
                return drive, found, False
            offset, is_fresh = drive.tail, drive.tail == drive.end
            try:
                self._check_limit(name, offset + nbytes - drive.end, nbytes)
                _grow(drive, offset + nbytes - drive.end, name, nbytes)
            except OffloadDiskError:
                if drive is drives[-1]:
                    raise
            else:
                drive.free.pop(offset, None)
                return drive, offset, is_fresh
        raise AssertionError("a store has a drive")

    def _check_limit(self, name: str, more: int, nbytes: int) -> None:
        if self.limit_bytes is None or sum(drive.end for drive in self._drives) + more <= self.limit_bytes:
            return
        raise OffloadDiskError(
            errno.ENOSPC,
            f"NvmeStore: {name!r} needs {nbytes} bytes in one piece, and of {self.limit_bytes} bytes "
            f"{self.limit_bytes - self.used_bytes} are free; raise limit_bytes",
        )

    def _check_open(self, name: str) -> None:
        if not self._drives:
            raise OffloadStateError(f"NvmeStore: {name!r}: the store is closed; make a new one")


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _open(engine: ak.TransferEngine, directory: str) -> Drive:
    path = os.path.join(directory, f".zero-offload-{secrets.token_hex(8)}")
    try:
        os.makedirs(directory, exist_ok=True)
        file = engine.open(path, nbytes=0)
        try:
            drive = Drive(directory, file, os.open(path, os.O_RDWR))
        finally:
            os.unlink(path)
    except OSError as error:
        raise OffloadDiskError(
            error.errno or errno.EIO,
            f"NvmeStore: {directory}: {os.strerror(error.errno or errno.EIO)}; choose a directory that this process "
            "may write to",
        ) from error
    return drive


def _grow(drive: Drive, more: int, name: str, nbytes: int) -> None:
    """Have the file system set more bytes aside at the end of the file, for a tensor of so many."""
    try:
        os.posix_fallocate(drive.descriptor, drive.end, more)
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
    drive.end += more
