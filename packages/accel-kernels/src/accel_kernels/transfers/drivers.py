"""Who moves the bytes: io_uring, threads (both C++) or Python threads; the first that this machine allows.

A driver takes descriptors and addresses and knows nothing of tensors, stripes or error texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from .. import native
from ..errors import AccelValueError, BackendUnavailableError

DRIVERS = ("io_uring", "threads", "portable")

# (file, offset, address, bytes); the file is what the driver's `attach` gave.
Piece = tuple[Any, int, int, int]


class Handle(Protocol):
    """A request under way."""

    def wait(self) -> None:
        """Return when it is done, well or not."""

    def is_done(self) -> bool:
        """Whether it is done; does not wait."""

    def failure(self) -> tuple[int, int, int] | None:
        """Once done: None, or (errno, number of the piece, offset); errno 0: the file ends there."""

    def bytes_done(self) -> int:
        """Once done: bytes that got through."""


class Driver(Protocol):
    """What moves bytes. Any thread may call it, none after ``close``."""

    def attach(self, direct: int, buffered: int, align: int, memory_align: int) -> Any:
        """A file, by its descriptors: with ``O_DIRECT`` (or -1) and without; they stay the caller's."""

    def detach(self, file: Any) -> None:
        """Take no more requests for a file, and return when none uses it."""

    def submit(self, pieces: Sequence[Piece], writes: bool) -> Handle:
        """Start a request; the caller keeps the memory alive until it is done.

        Raises RuntimeError if the driver has been closed or a file detached.
        """

    def add_buffer(self, address: int, nbytes: int) -> int:
        """Let the system keep a buffer's pages at hand: an id, or -errno."""

    def remove_buffer(self, buffer_id: int) -> None:
        """Undo ``add_buffer``."""

    def close(self) -> None:
        """Return when everything is done and every thread has ended."""


def why_not(name: str) -> str | None:
    """Why a driver cannot run here, or None if it can."""
    if name == "portable":
        return None
    if native.cpu is None:
        return native.why_not
    if name == "io_uring":
        return str(native.cpu.why_no_uring()) or None
    return None


def preferred() -> tuple[str, str]:
    """The driver that runs when none is asked for, and why it and no better one."""
    reason = why_not("io_uring")
    if reason is None:
        return "io_uring", "this kernel has it"
    return ("portable" if native.cpu is None else "threads"), reason


def make(name: str | None, queue_depth: int, block_bytes: int, num_threads: int) -> tuple[str, str, Driver]:
    """A driver: its name, why it is that one, and itself.

    Raises:
        AccelValueError: ``name`` is not None and not in ``DRIVERS``.
        BackendUnavailableError: it is, but cannot run here.
    """
    if name is not None:
        if name not in DRIVERS:
            raise AccelValueError(f"TransferEngine: engine: expected None or one of {DRIVERS}, got {name!r}")
        reason = why_not(name)
        if reason is not None:
            raise BackendUnavailableError(
                f"TransferEngine: engine {name!r}: {reason}; None takes the best one"
            )
        return name, "asked for", _start(name, queue_depth, block_bytes, num_threads)
    name, why = preferred()
    try:
        return name, why, _start(name, queue_depth, block_bytes, num_threads)
    except BackendUnavailableError as error:  # a ring so small that the probe could have it
        if name != "io_uring":
            raise
        return "threads", str(error), _start("threads", queue_depth, block_bytes, num_threads)


def _start(name: str, queue_depth: int, block_bytes: int, num_threads: int) -> Driver:
    try:
        if name == "portable":
            from .portable import PortableDriver

            return PortableDriver(block_bytes=block_bytes, num_threads=num_threads)
        assert native.cpu is not None
        return cast(Driver, native.cpu.TransferEngine(name, queue_depth, block_bytes, num_threads))
    except RuntimeError as error:
        raise BackendUnavailableError(f"TransferEngine: engine {name!r}: {error}") from error
