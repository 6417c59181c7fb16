"""Checksums of a data file, page by page, and the footer that holds them.

A file's data is cut into pages of `page_bytes` (the last one shorter). Each has an XXH3 checksum of 64 bits; all of
them, little-endian, follow the data: the footer. The index holds the footer's own checksum. So a reader can check
what it has read without reading more than whole pages, and an index stays small.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

PAGE_BYTES = 64 << 10
Checksums = npt.NDArray[np.uint64]


def num_pages(data_bytes: int, page_bytes: int) -> int:
    """Pages of a file's data."""
    return -(-data_bytes // page_bytes)


def checksum(data: memoryview | bytes) -> int:
    """XXH3, 64 bits."""
    return xxhash.xxh3_64_intdigest(data)


def page_checksums(data: memoryview, page_bytes: int) -> list[int]:
    """Of data that begins at a page."""
    return [checksum(data[at : at + page_bytes]) for at in range(0, len(data), page_bytes)]


def footer_of(checksums: Checksums) -> bytes:
    """The bytes that follow the data."""
    return checksums.astype("<u8").tobytes()


def checksums_of(footer: bytes) -> Checksums:
    """What `footer_of` wrote."""
    return np.frombuffer(footer, dtype="<u8").astype(np.uint64)


def first_bad_page(data: memoryview, first: int, expected: Checksums, page_bytes: int) -> int | None:
    """The first page that is not what was written.

    Args:
        data: whole pages from page `first` on.
        first: see there.
        expected: checksums of the file.
        page_bytes: bytes of a page.
    """
    for number, found in enumerate(page_checksums(data, page_bytes), first):
        if found != expected[number]:
            return number
    return None
