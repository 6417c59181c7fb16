"""Checksums of a data file, page by page, and the footer that holds them.

A file's data is cut into pages of `page_bytes` (the last one shorter). Each has an XXH3 checksum of 64 bits; all of
them, little-endian, follow the data: the footer. The index holds the footer's own checksum. So a reader can check
what it has read without reading more than whole pages, and an index stays small.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def page_checksums(views: Iterable[memoryview], page_bytes: int) -> list[int]:
    """Of data that begins at a page; it may lie in several pieces of memory."""
    found: list[int] = []
    begun, room = xxhash.xxh3_64(), page_bytes
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + room]
            at += len(part)
            if len(part) == page_bytes:
                found.append(checksum(part))
                continue
            begun.update(part)
            room -= len(part)
            if room == 0:
                found.append(begun.intdigest())
                begun, room = xxhash.xxh3_64(), page_bytes
    if room < page_bytes:
        found.append(begun.intdigest())
    return found


def footer_of(checksums: Checksums) -> bytes:
    """The bytes that follow the data."""
    return checksums.astype("<u8").tobytes()


def checksums_of(footer: bytes) -> Checksums:
    """What `footer_of` wrote."""
    return np.frombuffer(footer, dtype="<u8").astype(np.uint64)


def first_bad_page(
    views: Iterable[memoryview], first: int, expected: Checksums, page_bytes: int
) -> int | None:
    """The first page that is not what was written.

    Args:
        views: whole pages from page `first` on, in pieces of memory.
        first: see there.
        expected: checksums of the file.
        page_bytes: bytes of a page.
    """
    for number, found in enumerate(page_checksums(views, page_bytes), first):
        if found != expected[number]:
            return number
    return None
