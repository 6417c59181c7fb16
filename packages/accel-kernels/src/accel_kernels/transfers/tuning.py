"""Which block size and queue depth suit a disk: measured on a file of its own, within a time limit.

In: a folder. Out: ``TransferSettings``, whose fields are ``TransferEngine``'s arguments.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import AccelValueError
from .drivers import preferred
from .engine import MIB, TransferEngine
from .failures import explain, explained
from .files import TransferFile
from .memory import aligned_empty

# (block bytes, queue depth), likely winners first: time may run out. Threads: that many of them.
POINTS = ((MIB, 32), (MIB, 8), (4 * MIB, 8), (256 << 10, 32), (256 << 10, 128), (4 * MIB, 32))
THREAD_POINTS = ((MIB, 4), (MIB, 8), (4 * MIB, 4), (MIB, 16))
LEAST_BYTES, MOST_BYTES = 16 * MIB, 256 * MIB


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """The fastest of what was tried, and how fast it was (1 GB = 1e9 bytes).

    ``TransferEngine(**settings.arguments())`` is an engine of it.
    """

    engine: str
    block_bytes: int
    queue_depth: int
    num_threads: int
    read_gb_per_s: float
    write_gb_per_s: float
    direct: bool
    """Whether the file system went past the page cache; if not, the speeds are the cache's."""
    num_points: int
    """Of how many settings this is the best."""

    def arguments(self) -> dict[str, str | int]:
        """What ``TransferEngine`` takes."""
        return {
            "engine": self.engine,
            "block_bytes": self.block_bytes,
            "queue_depth": self.queue_depth,
            "num_threads": self.num_threads,
        }


def tune(
    directory: str | os.PathLike[str], *, seconds: float = 2.0, engine: str | None = None
) -> TransferSettings:
    """Measure reading and writing at a few block sizes and queue depths; the best for as much of both.

    Writes to a temporary file there, of 16 to 256 MiB and at most a quarter of what is free, and removes it
    whatever happens. Takes as much memory for the time being.

    Args:
        directory: a folder on the disk in question.
        seconds: time limit; one point at least is measured whatever it says.
        engine: as ``TransferEngine``'s.

    Raises:
        TransferError: the folder cannot be written to, or has less than 64 MiB free.
        AccelValueError, BackendUnavailableError: ``seconds`` is not above 0, or no such engine here.
    """
    if not seconds > 0:
        raise AccelValueError(f"tune: seconds: expected above 0, got {seconds}")
    began = time.monotonic()
    name = engine or preferred()[0]
    points = POINTS if name == "io_uring" else THREAD_POINTS
    folder = os.fspath(directory)
    with explained(folder, "making a file to measure with"):
        handle, path = tempfile.mkstemp(prefix=".transfer-tune-", dir=folder)
        os.close(handle)
    try:
        nbytes = min(MOST_BYTES, shutil.disk_usage(folder).free // 4 // MIB * MIB)
        if nbytes < LEAST_BYTES:
            raise explain(
                folder,
                errno.ENOSPC,
                f"measuring with at least {LEAST_BYTES} bytes, a quarter of what is free",
            )
        with TransferEngine(engine=name) as first, first.open(path, nbytes=nbytes) as file:
            nbytes, memory = _prepare(first, file, nbytes, seconds / (3 * len(points)))
        found: list[TransferSettings] = []
        for point in points:
            spent = time.monotonic() - began
            if found and spent + spent / (len(found) + 1) > seconds:
                break
            found.append(_measure(name, path, memory, point))
    finally:
        Path(path).unlink(missing_ok=True)
    best = min(found, key=lambda s: 1 / s.read_gb_per_s + 1 / s.write_gb_per_s)
    return TransferSettings(**{**vars(best), "num_points": len(found)})


def _prepare(
    engine: TransferEngine, file: TransferFile, nbytes: int, seconds: float
) -> tuple[int, torch.Tensor]:
    """Write the file once, for new blocks are slower than old ones; as much as can be written in so long."""
    memory = aligned_empty(nbytes)
    # Not zeros: some disks do not store them. A MiB again and again is quicker made than so much noise.
    pattern = torch.randint(0, 256, (MIB,), dtype=torch.uint8)
    memory.view(-1, MIB)[:] = pattern
    done, began = 0, time.monotonic()
    while done < memory.numel() and (done == 0 or time.monotonic() - began < seconds):
        engine.write(file, done, memory[done : done + LEAST_BYTES]).wait()
        done = min(done + LEAST_BYTES, memory.numel())
    return done, memory[:done]


def _measure(name: str, path: str, memory: torch.Tensor, point: tuple[int, int]) -> TransferSettings:
    block_bytes, depth = point
    threads = 4 if name == "io_uring" else depth
    with (
        TransferEngine(
            engine=name, block_bytes=block_bytes, queue_depth=depth, num_threads=threads
        ) as engine,
        engine.open(path) as file,
    ):
        speeds = []
        for start in (engine.write, engine.read):
            began = time.perf_counter()
            start(file, 0, memory).wait()
            speeds.append(memory.numel() / 1e9 / (time.perf_counter() - began))
        return TransferSettings(
            engine=name,
            block_bytes=block_bytes,
            queue_depth=depth,
            num_threads=threads,
            write_gb_per_s=speeds[0],
            read_gb_per_s=speeds[1],
            direct=file.direct,
            num_points=1,
        )
