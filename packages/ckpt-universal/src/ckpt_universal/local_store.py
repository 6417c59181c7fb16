"""`Directory` on this machine's file systems: O_DIRECT where they have it, fsync, rename, flock."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
            self._path.mkdir(parents=True, exist_ok=True)
        return not existed

    def names(self) -> list[str]:
        """See `Directory`."""
        try:
            return sorted(os.listdir(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """See `Directory`."""
        return (self._path / name).stat().st_size

    def read(self, name: str, most: int) -> bytes:
        """See `Directory`."""
        with (self._path / name).open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise CorruptError(f"{self._path / name}: longer than the {most} bytes that it should have")
        return data

    def put(self, name: str, data: bytes) -> None:
        """See `Directory`."""
        beside = self._path / f".{name}.{os.getpid()}.new"
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
        handle = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def sink(self, name: str, nbytes: int | None) -> LocalSink:
        """See `Directory`."""
        with _explained(str(self._path / name)):
            free = shutil.disk_usage(self._path).free
            if nbytes is not None and nbytes > free:
                raise OSError(errno.ENOSPC, f"{nbytes} bytes are to be written and {free} are free")
            return LocalSink(self._path / name, self._sync, nbytes)

    def source(self, name: str) -> LocalSource:
        """See `Directory`."""
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
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            return lambda: None  # a file system without locks
        os.truncate(handle, 0)
        os.write(handle, f"{socket.gethostname()}, process {os.getpid()}\n".encode())

        def release() -> None:
            path.unlink(missing_ok=True)
            os.close(handle)

        return release

    def modified_s(self, name: str) -> float:
        """See `Directory`."""
        return (self._path / name).stat().st_mtime


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
