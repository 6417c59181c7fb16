"""`Directory` on this machine's file systems: O_DIRECT where they have it, fsync, rename, flock."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import CheckpointError, CorruptError
from .stores import ALIGN
from .vectors import skip

MOST_VIEWS = 512
"""In one call of the system, which takes 1024."""
STALE_S = 60.0
"""A file that is to be renamed into place has not been, for so long: its process is dead."""


class LocalDirectory:
    """A directory of this machine's file systems."""

    has_locks = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self.path = str(path)

    def child(self, name: str) -> LocalDirectory:
        """See `Directory`."""
        return LocalDirectory(self._path / name)

    def make(self) -> bool:
        """See `Directory`."""
        with _explained(self.path):
            existed = self._path.is_dir()
            new = [each for each in (self._path, *self._path.parents) if not each.exists()]
            self._path.mkdir(parents=True, exist_ok=True)
            for each in new:
                _sync(each.parent)
        return not existed

    def names(self) -> list[str]:
        """See `Directory`."""
        try:
            with _readable(self.path):
                return sorted(os.listdir(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """See `Directory`."""
        with _readable(str(self._path / name)):
            return (self._path / name).stat().st_size

    def read(self, name: str, most: int) -> bytes:
        """See `Directory`."""
        with _readable(str(self._path / name)), (self._path / name).open("rb") as file:
            # What it has decides, for `most` may be anything; a byte more tells whether it grows.
            data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        if len(data) > most:
            raise CorruptError(f"{self._path / name}: longer than the {most} bytes that it should have")
        return data

    def put(self, name: str, data: bytes) -> None:
        """See `Directory`."""
        # Another thread, or a process of this number in another container, may be putting one here, too.
        beside = self._path / f".{name}.{secrets.token_hex(8)}.new"
        with _explained(str(self._path / name)):
            try:
                with beside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self._path / name)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            self._sync()
            self._clear(name)

    def _clear(self, name: str) -> None:
        """Remove what processes that were killed in `put` have left."""
        for other in self._path.glob(f".{name}.*.new"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > STALE_S:
                    other.unlink()

    def _sync(self) -> None:
        """Make the names in the directory durable."""
        _sync(self._path)

    def sink(self, name: str, nbytes: int | None) -> LocalSink:
        """See `Directory`."""
        with _explained(str(self._path / name)):
            free = shutil.disk_usage(self._path).free
            if nbytes is not None and nbytes > free:
                raise OSError(errno.ENOSPC, f"{nbytes} bytes are to be written and {free} are free")
            return LocalSink(self._path / name, self._sync, nbytes)

    def source(self, name: str) -> LocalSource:
        """See `Directory`."""
        with _readable(str(self._path / name)):
            return LocalSource(self._path / name)

    def remove(self, name: str) -> None:
        """See `Directory`."""
        (self._path / name).unlink(missing_ok=True)

    def remove_empty(self) -> None:
        """See `Directory`."""
        with suppress(OSError):
            self._path.rmdir()

    def lock(self, name: str) -> Callable[[], None] | None:
        """See `Directory`."""
        path = self._path / name
        with _explained(str(path)):
            lock = _Lock(path)
        try:
            if not lock.acquire():
                lock.close()
                return None
        except BaseException:  # the file may be another's: it stays
            lock.close()
            raise
        try:
            lock.sign()
        except BaseException:
            lock.release()
            raise
        return lock.release

    def modified_s(self, name: str) -> float:
        """See `Directory`."""
        with _readable(str(self._path / name)):
            return (self._path / name).stat().st_mtime


class _Lock:
    """A file that is locked by its open descriptor; whoever dies lets go of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _locks().add(self)

    def acquire(self) -> bool:
        """Whether nobody else holds it; a file system without locks lets everyone have it."""
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True

    def sign(self) -> None:
        """Say who holds it, if the disk has room: it is for messages alone."""
        assert self._handle is not None
        with suppress(OSError):
            os.truncate(self._handle, 0)
            os.write(self._handle, f"{socket.gethostname()}, process {os.getpid()}\n".encode())

    def release(self) -> None:
        """Remove the file and let go; nothing in a forked child, and nothing the second time."""
        if self._handle is not None:
            try:
                with _explained(str(self._path)):
                    self._path.unlink(missing_ok=True)
            finally:
                self.close()

    def close(self) -> None:
        """Let go; the file stays."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(OSError):
                os.close(handle)


@cache
def _locks() -> weakref.WeakSet[_Lock]:
    """Those of this process. A forked child drops its copies, which would hold them when this process has died."""
    locks: weakref.WeakSet[_Lock] = weakref.WeakSet()

    def drop() -> None:
        for lock in list(locks):
            lock.close()

    os.register_at_fork(after_in_child=drop)
    return locks


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What the system says, with the file and what to do."""
    try:
        yield
    except OSError as error:
        cure = ""
        if error.errno == errno.ENOSPC:
            with suppress(OSError):
                free = shutil.disk_usage(os.path.dirname(path) or ".").free
                cure = f"; {free} bytes are free there: make room, or prune old steps"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            cure = "; choose a path that this process may write to"
        raise CheckpointError(f"{path}: {error.strerror or error}{cure}") from error


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """What the system says where the right to read is missing; its other errors are for the caller."""
    try:
        yield
    except PermissionError as error:
        raise CheckpointError(
            f"{path}: {error.strerror or error}; let this process read it, or choose another path"
        ) from error


class LocalSink:
    """A new file, written by several threads past the page cache."""

    num_writers = 6

    def __init__(self, path: Path, sync_names: Callable[[], None], nbytes: int | None) -> None:
        self._path = path
        self._sync_names = sync_names
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self.align = ALIGN
        try:
            self._handle = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.align = 1  # a file system without O_DIRECT, such as tmpfs
            path.unlink(missing_ok=True)
            self._handle = os.open(path, flags, 0o644)
        if nbytes and self.align > 1:
            _reserve(self._handle, nbytes)

    def write_at(self, offset: int, views: Sequence[memoryview]) -> None:
        """See `Sink`."""
        left = list(views)
        with _explained(str(self._path)):
            while left:
                written = os.pwritev(self._handle, left[:MOST_VIEWS], offset)
                left, offset = skip(left, written), offset + written

    def finish(self, nbytes: int) -> None:
        """See `Sink`."""
        with _explained(str(self._path)):
            os.ftruncate(self._handle, nbytes)
            os.fsync(self._handle)
            os.close(self._handle)
            self._sync_names()

    def abandon(self) -> None:
        """See `Sink`."""
        with suppress(OSError):
            os.close(self._handle)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def _reserve(handle: int, nbytes: int) -> None:
    """Room on the disk before the first write: several threads then write at once, for the file grows no more.

    Not by `os.posix_fallocate`, which writes to every page where a file system knows no reservations.
    """
    fallocate = getattr(ctypes.CDLL(None), "fallocate64", None)
    if fallocate is not None:  # a refusal costs only time; a full disk refuses the writes, too
        fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


class LocalSource:
    """A file, read by several threads past the page cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.align = ALIGN
        try:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.align = 1
            self._handle = os.open(path, os.O_RDONLY)

    def read_into(self, offset: int, buffer: memoryview, need: int) -> None:
        """See `Source`."""
        done = 0
        while done < need:
            try:
                read = os.preadv(self._handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise CorruptError(f"{self._path}: byte {offset + done}: {error.strerror}") from error
            if read == 0:
                raise CorruptError(f"{self._path}: ends at byte {offset + done}, before byte {offset + need}")
            done += read
            if done < need and done % self.align:  # a short read that O_DIRECT cannot go on from
                raise CorruptError(f"{self._path}: ends at byte {offset + done}, before byte {offset + need}")

    def close(self) -> None:
        """See `Source`."""
        os.close(self._handle)


def _sync(folder: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
