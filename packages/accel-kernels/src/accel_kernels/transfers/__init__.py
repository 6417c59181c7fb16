"""Bytes between files and memory with many requests in flight.

Modules, in the order in which a transfer passes through them:

- ``engine``: ``TransferEngine`` and ``Transfer``: what is asked for, and waiting for it.
- ``memory``: the address of what is given; ``aligned_empty``.
- ``files``: one file or a striped row of them, opened past the page cache.
- ``drivers``: which driver moves the bytes here: io_uring or threads (C++, ``csrc/cpu/transfer``), or
  ``portable`` (Python threads).
- ``failures``: what the system says, as an error that names file and bytes.
- ``tuning``: which block size and queue depth suit a disk.
"""

from .engine import Transfer, TransferEngine
from .files import StripedFile, TransferFile
from .memory import aligned_empty
from .tuning import TransferSettings, tune

__all__ = [
    "StripedFile",
    "Transfer",
    "TransferEngine",
    "TransferFile",
    "TransferSettings",
    "aligned_empty",
    "tune",
]
