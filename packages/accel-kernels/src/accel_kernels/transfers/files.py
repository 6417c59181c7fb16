"""Files that transfers go to and come from, opened past the page cache, and rows of them.

In: paths. Out: ``TransferFile`` and ``StripedFile``, which turn an offset into a driver's pieces. ``Note [Pages]``:
whole pages travel with ``O_DIRECT``, what is left of a head or a tail through a second descriptor and the page
cache. No page holds bytes of both kinds, so neighbours may be written at the same time, and the kernel keeps cache
and disk agreed.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress

from .. import native
from ..errors import AccelValueError
from .drivers import Driver, Piece
from .failures import explain, explained

UNKNOWN_ALIGN = 4096  # what every disk of today accepts


class TransferFile:
    """One open file of an engine; made by ``TransferEngine.open``.

    Attributes:
        path: where it is.
        writable: whether it was opened for writing.
        direct: whether whole pages go past the page cache (``O_DIRECT``).
    """

    def __init__(self, driver: Driver, path: str, *, nbytes: int | None, write: bool) -> None:
        self.path = path
        self.writable = write
        self._driver = driver
        buffered = _open(path, nbytes, write)
        direct, align, memory_align = -1, mmap.PAGESIZE, 1
        try:
            direct, align, memory_align = _open_direct(path, write)
            if direct >= 0 and hasattr(os, "posix_fadvise"):
                # Reading ahead would put pages into the cache that are written past it. See Note [Pages].
                os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
            self._file = driver.attach(direct, buffered, align, memory_align)
        except BaseException:
            _close((buffered, direct))
            raise
        self._buffered = buffered
        self.direct = direct >= 0
        self._pid = os.getpid()
        self._let_go = weakref.finalize(self, _release, driver, self._file, (buffered, direct), self._pid)

    @property
    def nbytes(self) -> int:
        """The file's size now."""
        self.check_open()
        return os.fstat(self._buffered).st_size

    def sync(self) -> None:
        """Return when what has been written is on the disk (``fdatasync``), to survive a power cut.

        Raises:
            TransferError: the system says that it is not.
        """
        self.check_open()
        with explained(self.path, "making it durable"):
            os.fdatasync(self._buffered)

    def close(self) -> None:
        """Wait for transfers under way, then close; more calls do nothing."""
        if self._let_go.alive and os.getpid() == self._pid:
            self._driver.detach(self._file)  # an interrupt here leaves the descriptors to the next call
        self._let_go()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return not self._let_go.alive

    def check_open(self) -> None:
        """Raise if it has been closed."""
        if self.closed:
            raise AccelValueError(f"TransferFile: {self.path}: is closed")

    def pieces(self, offset: int, address: int, nbytes: int) -> list[Piece]:
        """What a driver is asked for these bytes."""
        return [(self._file, offset, address, nbytes)] if nbytes else []

    def locate(self, offset: int, nbytes: int, piece: int) -> TransferFile:
        """The file that a piece of a transfer belongs to."""
        return self

    def belongs_to(self, driver: Driver) -> bool:
        """Whether it was opened by that driver's engine."""
        return self._driver is driver

    def __enter__(self) -> TransferFile:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        how = "closed" if self.closed else "direct" if self.direct else "through the page cache"
        return f"TransferFile({self.path!r}, {how})"


class StripedFile:
    """Several files, on as many disks, that are read and written as one; made by ``TransferEngine.open_striped``.

    Byte ``o`` lies in file ``(o // stripe_bytes) % len(files)``, as in RAID 0.
    """

    def __init__(self, files: Sequence[TransferFile], stripe_bytes: int) -> None:
        self.files = tuple(files)
        self.stripe_bytes = stripe_bytes

    @property
    def path(self) -> str:
        """The first file's path, and how many there are."""
        return f"{self.files[0].path} and {len(self.files) - 1} more"

    @property
    def writable(self) -> bool:
        """Whether all were opened for writing."""
        return all(file.writable for file in self.files)

    @property
    def direct(self) -> bool:
        """Whether whole pages go past the page cache in all of them."""
        return all(file.direct for file in self.files)

    def sync(self) -> None:
        """See ``TransferFile.sync``."""
        for file in self.files:
            file.sync()

    def close(self) -> None:
        """See ``TransferFile.close``."""
        for file in self.files:
            file.close()

    @property
    def closed(self) -> bool:
        """Whether any of them has been closed."""
        return any(file.closed for file in self.files)

    def check_open(self) -> None:
        """Raise if any of them has been closed."""
        for file in self.files:
            file.check_open()

    def pieces(self, offset: int, address: int, nbytes: int) -> list[Piece]:
        """What a driver is asked for these bytes, in their order."""
        found: list[Piece] = []
        for k, at, start, length in stripes(offset, nbytes, len(self.files), self.stripe_bytes):
            found += self.files[k].pieces(at, address + start, length)
        return found

    def locate(self, offset: int, nbytes: int, piece: int) -> TransferFile:
        """The file that a piece of a transfer belongs to."""
        spans = list(stripes(offset, nbytes, len(self.files), self.stripe_bytes))
        return self.files[spans[piece][0]]

    def belongs_to(self, driver: Driver) -> bool:
        """Whether it was opened by that driver's engine."""
        return all(file.belongs_to(driver) for file in self.files)

    def __enter__(self) -> StripedFile:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def stripes(
    offset: int, nbytes: int, num_files: int, stripe_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """Where bytes of a striped row lie: (file, offset in it, offset in the transfer, bytes), in order."""
    at = offset
    while at < offset + nbytes:
        stripe, within = divmod(at, stripe_bytes)
        length = min(stripe_bytes - within, offset + nbytes - at)
        row, file = divmod(stripe, num_files)
        yield file, row * stripe_bytes + within, at - offset, length
        at += length


def share_bytes(nbytes: int, num_files: int, stripe_bytes: int) -> int:
    """Bytes that each file of a striped row needs to hold so many together."""
    rows = -(-nbytes // (stripe_bytes * num_files))
    return rows * stripe_bytes


def _open(path: str, nbytes: int | None, write: bool) -> int:
    """A descriptor, of a file of ``nbytes`` at least where that is given."""
    if nbytes is None:
        with explained(path, "opening it for " + ("reading and writing" if write else "reading")):
            return os.open(path, os.O_RDWR if write else os.O_RDONLY)
    existed = os.path.exists(path)
    with explained(path, f"making room for {nbytes} bytes"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        size = os.fstat(descriptor).st_size
        try:
            _reserve(descriptor, nbytes)
        except BaseException:
            with suppress(OSError):
                os.truncate(path, size) if existed else os.unlink(path)
            os.close(descriptor)
            raise
    return descriptor


def _reserve(descriptor: int, nbytes: int) -> None:
    """Have the disk keep so many bytes for the file: it is full now, or not when they are written."""
    if nbytes <= 0:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    if os.fstat(descriptor).st_size < nbytes:
        os.ftruncate(descriptor, nbytes)


def _open_direct(path: str, write: bool) -> tuple[int, int, int]:
    """A descriptor past the page cache or -1, and the alignment that it asks of offsets and addresses."""
    flag = getattr(os, "O_DIRECT", 0)
    without = (-1, mmap.PAGESIZE, 1)
    if not flag:
        return without
    try:
        descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | flag)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return without
        raise explain(path, error.errno or errno.EIO, "opening it past the page cache") from error
    of_memory, of_offset = (-1, -1) if native.cpu is None else native.cpu.direct_alignment(descriptor)
    if of_memory == 0 or of_offset == 0:
        os.close(descriptor)
        return without
    return (
        descriptor,
        max(mmap.PAGESIZE, UNKNOWN_ALIGN, of_offset),
        of_memory if of_memory > 0 else UNKNOWN_ALIGN,
    )


def _release(driver: Driver, file: object, descriptors: tuple[int, int], pid: int) -> None:
    if os.getpid() == pid:  # a forked child has the descriptors, but not the driver's threads
        driver.detach(file)
    _close(descriptors)


def _close(descriptors: tuple[int, int]) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
