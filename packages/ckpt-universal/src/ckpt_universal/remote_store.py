"""`Directory` in a store that fsspec knows: objects appear whole, when they have been written; there are no locks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

from .errors import CheckpointError, CorruptError


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

    def make(self) -> bool:
        """See `Directory`."""
        with _remote(self.path):
            existed = bool(self._system.isdir(self._inner))
            self._system.makedirs(self._inner, exist_ok=True)
        return not existed

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

    def write_at(self, offset: int, views: Sequence[memoryview]) -> None:
        """See `Sink`."""
        with _remote(self._path):
            for view in views:
                self._file.write(bytes(view))

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

    def read_into(self, offset: int, buffer: memoryview, need: int) -> None:
        """See `Source`."""
        with self._lock:
            self._file.seek(offset)
            data = self._file.read(need)
        if len(data) < need:
            raise CorruptError(
                f"{self._path}: ends at byte {offset + len(data)}, before byte {offset + need}"
            )
        buffer[:need] = data

    def close(self) -> None:
        """See `Source`."""
        self._file.close()
