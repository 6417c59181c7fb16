"""Where checkpoints lie: a directory on this machine, or under a prefix of a remote store.

In: names and bytes. Out: files that are whole and on the disk when they are said to be. `LocalDirectory` writes past
the page cache (O_DIRECT) where the file system allows; `RemoteDirectory` goes through fsspec, whose objects appear
whole. Everything above this module knows `Directory`, `Sink` and `Source` alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from .errors import CheckpointError, ConfigError, CorruptError

ALIGN = 4096
"""O_DIRECT wants addresses, offsets and lengths to be multiples of it; so does every disk of today."""

STALE_S = 60.0
"""A file that is to be renamed into place has not been, for so long: its process is dead."""


class Sink(Protocol):
    """A new file.

    Attributes:
        align: lengths of writes are rounded up to it; `finish` cuts the file to its size.
        num_writers: threads that may write at once; 1 means: in order.
    """

    align: int
    num_writers: int

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of `data`."""

    def finish(self, nbytes: int) -> None:
        """Make the file `nbytes` long and durable, and close it."""

    def abandon(self) -> None:
        """Close, and leave nothing behind if possible; never raises."""


class Source(Protocol):
    """A file to be read by several threads; `align` as for `Sink`."""

    align: int

    def read_into(self, offset: int, out: memoryview, need: int) -> None:
        """Read from `offset` on; `need` bytes of `out` count, more may be written."""

    def close(self) -> None:
        """Close."""


class Directory(Protocol):
    """A flat place for files.

    Attributes:
        path: for messages.
        has_locks: `lock` keeps others out; elsewhere nobody can know whether a file is still being written.
    """

    path: str
    has_locks: bool

    def child(self, name: str) -> Directory:
        """The directory of this name in it; nothing is made."""

    def make(self) -> None:
        """Let it exist."""

    def names(self) -> list[str]:
        """Of what is in it; nothing if it does not exist."""

    def size(self, name: str) -> int:
        """Bytes of a file; `FileNotFoundError` if there is none."""

    def read(self, name: str, most: int) -> bytes:
        """A file of at most `most` bytes; `FileNotFoundError` if there is none."""

    def put(self, name: str, data: bytes) -> None:
        """Make or replace a file in one step; durable."""

    def sink(self, name: str, nbytes: int | None) -> Sink:
        """Begin a new file of so many bytes, if that is known."""

    def source(self, name: str) -> Source:
        """Open a file; `FileNotFoundError` if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def remove_empty(self) -> None:
        """Remove the directory, if nothing is in it."""

    def lock(self, name: str) -> Callable[[], None] | None:
        """Hold a file of this name as long as this process lives; returns what lets go, or None: another holds it."""

    def modified_s(self, name: str) -> float:
        """When a file last changed, in seconds since 1970; 0 where that is not known."""


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """The directory at a path, or under a URL that fsspec understands.

    Raises:
        ConfigError: it is a URL, and fsspec is not installed or does not know it.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return LocalDirectory(Path(text.removeprefix("file://")))
    if "://" not in text:
        return LocalDirectory(Path(text))
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(
            f"{text}: remote paths need fsspec; pip install 'ckpt-universal[remote]'"
        ) from error
    try:
        system, inner = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{text}: {error}") from error
    return RemoteDirectory(system, inner.rstrip("/"), text.rstrip("/"))


# -- this machine ---------------------------------------------------------------------------------------------


class LocalDirectory:
    """A directory of this machine's file systems."""

    has_locks = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self.path = str(path)

    def child(self, name: str) -> LocalDirectory:
        """See `Directory`."""
        return LocalDirectory(self._path / name)

    def make(self) -> None:
        """See `Directory`."""
        with _explained(self.path):
            self._path.mkdir(parents=True, exist_ok=True)

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
            return LocalSink(self._path / name, self._sync)

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

    num_writers = 4

    def __init__(self, path: Path, sync_names: Callable[[], None]) -> None:
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

    def write_at(self, offset: int, data: memoryview) -> None:
        """See `Sink`."""
        with _explained(str(self._path)):
            while data:
                written = os.pwrite(self._handle, data, offset)
                data, offset = data[written:], offset + written

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

    def read_into(self, offset: int, out: memoryview, need: int) -> None:
        """See `Source`."""
        done = 0
        while done < need:
            try:
                read = os.preadv(self._handle, [out[done:]], offset + done)
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


# -- elsewhere ------------------------------------------------------------------------------------------------


class RemoteDirectory:
    """A prefix of a store that fsspec knows: objects appear whole, when they have been written."""

    has_locks = False

    def __init__(self, system: Any, inner: str, path: str) -> None:
        self._system = system
        self._inner = inner
        self.path = path

    def child(self, name: str) -> RemoteDirectory:
        """See `Directory`."""
        return RemoteDirectory(self._system, f"{self._inner}/{name}", f"{self.path}/{name}")

    def make(self) -> None:
        """See `Directory`."""
        with _remote(self.path):
            self._system.makedirs(self._inner, exist_ok=True)

    def names(self) -> list[str]:
        """See `Directory`."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(PurePosixPath(each).name for each in found)

    def size(self, name: str) -> int:
        """See `Directory`."""
        return int(self._system.size(f"{self._inner}/{name}"))

    def read(self, name: str, most: int) -> bytes:
        """See `Directory`."""
        data: bytes = self._system.cat_file(f"{self._inner}/{name}", start=0, end=most + 1)
        if len(data) > most:
            raise CorruptError(f"{self.path}/{name}: longer than the {most} bytes that it should have")
        return data

    def put(self, name: str, data: bytes) -> None:
        """See `Directory`."""
        with _remote(f"{self.path}/{name}"):
            self._system.pipe_file(f"{self._inner}/{name}", data)

    def sink(self, name: str, nbytes: int | None) -> RemoteSink:
        """See `Directory`."""
        with _remote(f"{self.path}/{name}"):
            return RemoteSink(self._system, f"{self._inner}/{name}", f"{self.path}/{name}")

    def source(self, name: str) -> RemoteSource:
        """See `Directory`."""
        return RemoteSource(self._system.open(f"{self._inner}/{name}", "rb", cache_type="none"), self.path)

    def remove(self, name: str) -> None:
        """See `Directory`."""
        with suppress(FileNotFoundError):
            self._system.rm_file(f"{self._inner}/{name}")

    def remove_empty(self) -> None:
        """See `Directory`."""
        with suppress(OSError, NotImplementedError):  # stores of objects have no directories
            self._system.rmdir(self._inner)

    def lock(self, name: str) -> Callable[[], None] | None:
        """See `Directory`; stores have no locks, and a save's own token keeps its files apart all the same."""
        return lambda: None

    def modified_s(self, name: str) -> float:
        """See `Directory`."""
        try:
            return float(self._system.modified(f"{self._inner}/{name}").timestamp())
        except (NotImplementedError, FileNotFoundError):  # not every store tells
            return 0.0


@contextmanager
def _remote(path: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # every store has errors of its own
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from error


class RemoteSink:
    """A new object, written in order."""

    align, num_writers = 1, 1

    def __init__(self, system: Any, inner: str, path: str) -> None:
        self._system = system
        self._inner = inner
        self._path = path
        self._file = system.open(inner, "wb")

    def write_at(self, offset: int, data: memoryview) -> None:
        """See `Sink`."""
        with _remote(self._path):
            self._file.write(bytes(data))

    def finish(self, nbytes: int) -> None:
        """See `Sink`."""
        with _remote(self._path):
            self._file.close()

    def abandon(self) -> None:
        """See `Sink`."""
        with suppress(Exception):
            self._file.discard()
        with suppress(Exception):
            self._system.rm_file(self._inner)


class RemoteSource:
    """An object, read by ranges; one thread at a time."""

    align = 1

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path
        self._lock = threading.Lock()

    def read_into(self, offset: int, out: memoryview, need: int) -> None:
        """See `Source`."""
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(need)
        if len(data) < need:
            raise CorruptError(
                f"{self._path}: ends at byte {offset + len(data)}, before byte {offset + need}"
            )
        out[:need] = data

    def close(self) -> None:
        """See `Source`."""
        self._file.close()
