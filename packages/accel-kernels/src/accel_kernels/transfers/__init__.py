"""Bytes between files and memory with many requests in flight.

Modules, in the order in which a transfer passes through them:

- ``engine``: ``TransferEngine``: what can be asked for.
- ``memory``: the address of what is given; ``aligned_empty``.
- ``files``: one file or a striped row of them, opened past the page cache.
- ``drivers``: which driver moves the bytes here: io_uring or threads (C++, ``csrc/cpu/transfer``), or
  ``portable`` (Python threads).
- ``transfer``: ``Transfer``: waiting for it.
- ``failures``: what the system says, as an error that names file and bytes.
- ``tuning``: which block size and queue depth suit a disk.
"""

from .engine import TransferEngine
from .files import StripedFile, TransferFile
from .memory import aligned_empty
from .transfer import Transfer
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
