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
        free: ranges given back: size -> offsets.
    """

    directory: str
    file: ak.TransferFile
    descriptor: int
    end: int = 0
    free: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)

    def close(self) -> None:
        """Let go of the file; maps stay what they are."""
        self.file.close()
        self._close_descriptor()

    @property
    def used(self) -> int:
        """Bytes of tensors."""
        return self.end - sum(nbytes * len(offsets) for nbytes, offsets in self.free.items())


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
        limit_bytes: more than that is refused; None: what the file systems have free.

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
        if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
            raise OffloadDiskError(
                errno.ENOSPC,
                f"NvmeStore: {name!r} needs {nbytes} bytes, and {self.limit_bytes - self.used_bytes} of "
                f"{self.limit_bytes} are free; raise limit_bytes",
            )
        drive, offset, is_fresh = self._room_for(name, nbytes)
        self._places[name] = place = Place(drive, offset, numel, dtype, is_fresh)
        self.used_bytes += nbytes
        return place

    def remove(self, name: str) -> None:
        """Its range serves the next tensor of its size."""
        place = self._places.pop(name)
        nbytes = _pages(place.nbytes)
        self.used_bytes -= nbytes
        place.drive.free.setdefault(nbytes, []).append(place.offset)

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
        for drive in drives:
            if drive.free.get(nbytes):
                return drive, drive.free[nbytes].pop(), False
            offset = drive.end
            try:
                _grow(drive, nbytes, name)
            except OffloadDiskError:
                if drive is drives[-1]:
                    raise
            else:
                return drive, offset, True
        raise AssertionError("a store has a drive")

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


def _grow(drive: Drive, nbytes: int, name: str) -> None:
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
