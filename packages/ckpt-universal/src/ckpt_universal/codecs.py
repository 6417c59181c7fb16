"""Compression of chunks: whether it pays, and how.

Floating-point numbers hardly compress as they lie: their low bits are noise. With the first bytes of all elements
together, then the second ones, and so on ("zstd-bytes"), signs and exponents lie together, and those do.
Source: Hershcovitch et al., ZipNN: Lossless Compression for AI Models (2024), section 3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from .errors import ConfigError, CorruptError

RAW, ZSTD, ZSTD_BYTES = range(3)
MOST_RATIO = (128 << 10) // 4
"""No zstd frame decompresses to more times its length: a block holds at most 128 KiB, and takes at least 4 bytes to
hold any (RFC 8878, section 3.1.1.2)."""
LEVELS = (1, 3, 6)
"""Levels that `measure` tries; higher ones gain a percent and take several times as long."""


@dataclass(frozen=True)
class Compression:
    """How chunks are compressed.

    Attributes:
        level: of zstd; None stores chunks as they are.
    """

    level: int | None = None

    def __post_init__(self) -> None:
        if self.level is not None and not 1 <= self.level <= zstandard.MAX_COMPRESSION_LEVEL:
            raise ConfigError(
                f"compression: expected a zstd level from 1 to {zstandard.MAX_COMPRESSION_LEVEL}, got {self.level}"
            )


def encode(raw: memoryview, itemsize: int, level: int) -> tuple[int, bytes | memoryview]:
    """The codec and the bytes to store: `raw` itself where compression gains less than 2 %."""
    codec, data = ZSTD, raw
    if itemsize > 1:
        codec = ZSTD_BYTES
        data = _transposed(raw, itemsize)
    packed = zstandard.ZstdCompressor(level=level, write_content_size=True).compress(data)
    return (codec, packed) if len(packed) < 0.98 * len(raw) else (RAW, raw)


def decode(stored: memoryview, codec: int, nbytes: int, itemsize: int, where: str) -> memoryview:
    """The `nbytes` bytes that `encode` was given.

    Raises:
        CorruptError: it does not decompress, or to another length.
    """
    if codec == RAW:
        return stored
    try:
        # The size in the frame's header is a claim; only what the index says is allocated.
        size = zstandard.frame_content_size(stored)
        if size != nbytes:
            raise CorruptError(f"{where}: decompresses to {size} bytes, expected {nbytes}")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=nbytes)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{where}: {error}") from error
    if codec == ZSTD:
        return memoryview(data)
    return _transposed(memoryview(data), nbytes // itemsize)


def _transposed(raw: memoryview, columns: int) -> memoryview:
    """The bytes of a matrix with so many columns, transposed."""
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(-1, columns).T).reshape(-1).data


@dataclass(frozen=True)
class Measured:
    """What a level does to a sample: stored / raw bytes, and raw bytes a second of one thread."""

    level: int
    ratio: float
    bytes_per_s: float

    def seconds_per_byte(self, disk_bytes_per_s: float, threads: int) -> float:
        """Of a save, where compressing and writing overlap."""
        return max(1 / (self.bytes_per_s * threads), self.ratio / disk_bytes_per_s)


def measure(samples: Sequence[tuple[memoryview, int]], levels: Sequence[int] = LEVELS) -> list[Measured]:
    """Compress samples (bytes, itemsize) at each level."""
    found = []
    for level in levels:
        before, stored = time.perf_counter(), 0
        for raw, itemsize in samples:
            stored += len(encode(raw, itemsize, level)[1])
        seconds, total = time.perf_counter() - before, sum(len(raw) for raw, _ in samples)
        found.append(Measured(level, stored / max(total, 1), total / max(seconds, 1e-9)))
    return found


def level_that_pays(measured: Sequence[Measured], disk_bytes_per_s: float, threads: int) -> int | None:
    """The level with which a save is shortest; None where it is shortest without."""
    best, level = 1 / disk_bytes_per_s, None
    for each in measured:
        seconds = each.seconds_per_byte(disk_bytes_per_s, threads)
        if seconds < best:
            best, level = seconds, each.level
    return level
