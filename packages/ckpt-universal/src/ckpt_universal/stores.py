"""Where checkpoints lie: what everything above knows of directories and files.

In: names and bytes. Out: files that are whole and on the disk when they are said to be. Next: `local_store` writes past
the page cache where the file system allows; `remote_store` goes through fsspec; `places` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

ALIGN = 4096
"""O_DIRECT wants addresses, offsets and lengths to be multiples of it; so does every disk of today."""


class Sink(Protocol):
    """A new file.

    Attributes:
        align: what addresses, offsets and lengths of writes are multiples of; `finish` cuts the file to its size.
        num_writers: threads that may write at once; 1 means: in order.
    """

    align: int
    num_writers: int

    def write_at(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write pieces of memory, one after another."""

    def finish(self, nbytes: int) -> None:
        """Make the file `nbytes` long and durable, and close it."""

    def abandon(self) -> None:
        """Close, and leave nothing behind if possible; never raises."""


class Source(Protocol):
    """A file to be read by several threads; `align` as for `Sink`."""

    align: int

    def read_into(self, offset: int, buffer: memoryview, need: int) -> None:
        """Fill a buffer from `offset` on; the first `need` bytes count, more may be written."""

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

    def make(self) -> bool:
        """Let it exist; whether it did not before."""

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
