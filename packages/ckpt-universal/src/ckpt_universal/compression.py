"""Whether to compress a save: measured on the state itself and on the disk that it goes to.

In: a policy and the pieces to be written. Out: a level for all ranks, or none. Next: `writer`.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Sequence

from .codecs import level_that_pays, measure
from .errors import CheckpointError
from .ranks import Ranks
from .stores import Directory
from .writer import Piece, bytes_of

log = logging.getLogger(__name__)

SAMPLES, SAMPLE_BYTES = 8, 1 << 20
PROBE_BYTES = 64 << 20


def choose_level(
    wanted: int | str | None, pieces: Sequence[Piece], directory: Directory, ranks: Ranks
) -> int | None:
    """The level asked for; for "auto", that with which the first rank's measurements promise the shortest save."""
    if wanted != "auto":
        assert not isinstance(wanted, str)
        return wanted
    level: int | None = ranks.on_first("save: measuring", lambda: _measured_level(pieces, directory))
    return level


def _measured_level(pieces: Sequence[Piece], directory: Directory) -> int | None:
    taken = sorted(pieces, key=lambda piece: -piece.values.numel())
    samples = [
        (
            bytes_of(piece.values.reshape(-1)[: SAMPLE_BYTES // piece.values.element_size()]),
            piece.values.element_size(),
        )
        for piece in taken[:: max(1, len(taken) // SAMPLES)][:SAMPLES]
    ]
    if not samples:
        return None
    found = measure(samples)
    disk = write_speed(directory, ".speed")
    level = level_that_pays(found, disk, threads=2)
    said = ", ".join(f"level {m.level}: ratio {m.ratio:.2f}, {m.bytes_per_s / 1e6:.0f} MB/s" for m in found)
    log.info("compression: %s; the disk writes %.0f MB/s: %s", said, disk / 1e6, level or "none pays")
    return level


def write_speed(directory: Directory, name: str, nbytes: int = PROBE_BYTES) -> float:
    """Bytes a second of a durable write."""
    data = memoryview(mmap.mmap(-1, nbytes))
    data[:] = bytes(range(256)) * (nbytes // 256)
    directory.remove(name)
    sink = directory.sink(name, nbytes)
    try:
        before = time.perf_counter()
        for at in range(0, nbytes, 4 << 20):
            sink.write_at(at, [data[at : at + (4 << 20)]])
        sink.finish(nbytes)
        seconds = time.perf_counter() - before
    except CheckpointError:
        sink.abandon()
        raise
    directory.remove(name)
    return nbytes / max(seconds, 1e-9)
