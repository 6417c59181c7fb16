"""Memory of a file or of nobody, as long as something views it; pinned memory, to the byte.

In: sizes, and for a file its descriptor. Out: CPU tensors. Next: `drive_files` has views of a drive, `host_store` and
`copies` memory that a device copies from and to.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from .errors import OffloadMemoryError
from .free_bytes import host_free

# Note [Pinned to the byte]
# torch's pinned allocations have sizes of powers of two, and never go back to the system: a shard of 4.1 GiB would lock
# 8 GiB, which no plan of memory knows of. So CUDA is given pages of ours to lock.

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


def file_map(descriptor: int, offset: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A range of a file; what is written to the tensor is written to the file.

    Unlike Python's own mmap it keeps no descriptor, of which a process has a thousand.

    Args:
        descriptor: may be closed afterwards.
        offset: in bytes, a multiple of a page.
        numel: at least 1.
        dtype: of the elements.

    Raises:
        OSError: the system has no room for another map.
    """
    return torch.frombuffer(_map(numel * dtype.itemsize, descriptor, offset), dtype=dtype)


def pinned_empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Page-locked memory, uninitialised (with CUDA: zeros), see Note [Pinned to the byte].

    Raises:
        RuntimeError: there is no device, or the system does not lock so many bytes.
    """
    if not (numel and torch.cuda.is_available()):
        return torch.empty(numel, dtype=dtype, pin_memory=True)
    nbytes, locked, device = numel * dtype.itemsize, list[int](), torch.cuda.current_device()

    def unlock() -> None:
        for address in locked:
            torch.cuda.synchronize(device)  # a copy may be under way
            torch.cuda.cudart().cudaHostUnregister(address)

    tensor = torch.frombuffer(_map(nbytes, before_unmap=unlock), dtype=dtype)
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), nbytes, _PORTABLE))
    if code:
        with suppress(
            RuntimeError, AssertionError
        ):  # the runtime remembers the error for the next who launches
            torch.zeros(1, device="cuda")
        raise RuntimeError(f"{nbytes} bytes cannot be pinned: CUDA error {code}")
    locked.append(tensor.data_ptr())
    return tensor


def host_zeros(numel: int, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """Host memory of zeros, page-locked where a device copies from or to it.

    Raises:
        OffloadMemoryError: the system gives none.
    """
    return host_empty(numel * dtype.itemsize, "values that wait", pin=pin).view(dtype).zero_()


def host_empty(nbytes: int, what: str, *, pin: bool) -> torch.Tensor:
    """Host memory for something, uint8, uninitialised.

    Raises:
        OffloadMemoryError: the system gives none; says for what, bytes wanted and free.
    """
    try:
        return pinned_empty(nbytes, torch.uint8) if pin else torch.empty(nbytes, dtype=torch.uint8)
    except (RuntimeError, OSError) as error:
        raise OffloadMemoryError(
            f"{what}: the system gives no {nbytes} bytes of host memory, and {host_free()} are free: {error}"
        ) from error


def _map(
    nbytes: int, descriptor: int = -1, offset: int = 0, *, before_unmap: Callable[[], None] | None = None
) -> Any:
    """A map as a buffer, unmapped with the last that holds it."""
    flags = mmap.MAP_SHARED if descriptor >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc.mmap(None, nbytes, protection, flags, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"a map of {nbytes} bytes: {os.strerror(code)}")
    buffer = (ctypes.c_char * nbytes).from_address(address)

    def unmap() -> None:
        if before_unmap is not None:
            before_unmap()
        _libc.munmap(address, nbytes)

    weakref.finalize(buffer, unmap).atexit = False  # views may be in use until the very end
    return buffer
