"""Memory that transfers go to and come from: its address, and memory that suits disks best.

In: a tensor or anything with a buffer. Out: a ``Span``. Next: ``engine`` hands it to a driver.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import AccelTypeError, AccelValueError
from ..native import is_writable

if TYPE_CHECKING:
    from .engine import TransferEngine

HUGE_PAGE = 2 << 20
# Note [Huge pages]
# A disk's driver describes memory by its contiguous pieces: 512 for 2 MiB of small pages, and requests are split where
# there are too many. Memory in huge pages was moved 1.3 times as fast on a virtual disk. The system gives them for
# whole, aligned 2 MiB alone, and aligns a mapping by itself only if its length is a multiple; so a larger one is made,
# whose ends are never touched and take no memory.

# Note [Forgotten before it is unmapped]
# An engine forgets registered memory when its owner ends. A map that ends unmaps itself first, and tells afterwards:
# whoever maps memory in between may get the same addresses, and the engine would move the pages that were there. An
# array over the map tells first.


@dataclass(frozen=True)
class Span:
    """Bytes of memory, and what keeps them alive."""

    address: int
    nbytes: int
    owner: Any


def aligned_empty(nbytes: int, *, register: TransferEngine | None = None) -> torch.Tensor:
    """Uninitialised memory that begins on a page, as disks like it.

    From 2 MiB on it is in huge pages where the system has them, but for what follows the last whole one. It is freed
    with the last tensor that views it, and is anonymous memory of this process: not pinned for CUDA, not shared.

    Args:
        nbytes: its size.
        register: an engine whose kernel side keeps the pages at hand as long as the memory lives, which spares
            looking them up for every block. Taken as a hint, for the system may refuse (a limit on locked
            memory, an engine of threads): ``engine.registered_bytes`` tells.

    Returns:
        A CPU tensor of dtype uint8, shape ``(nbytes,)``.

    Raises:
        AccelValueError: ``nbytes`` is negative, or ``register`` is closed.
    """
    if nbytes < 0:
        raise AccelValueError(f"aligned_empty: nbytes: expected 0 or more, got {nbytes}")
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        raise AccelValueError("aligned_empty: needs a POSIX system")
    spare = HUGE_PAGE if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE") else 0  # Note [Huge pages]
    pages = mmap.mmap(-1, nbytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    owner = np.frombuffer(pages, dtype=np.uint8)  # Note [Forgotten before it is unmapped]
    tensor = torch.frombuffer(owner, dtype=torch.uint8)
    if spare:
        begin = -tensor.data_ptr() % HUGE_PAGE
        tensor = tensor[begin : begin + nbytes]
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE, begin, nbytes // HUGE_PAGE * HUGE_PAGE)
    if register is not None:
        register.adopt_buffer(owner, tensor.data_ptr(), nbytes)
    return tensor


def span_of(what: str, memory: Any, *, written: bool) -> Span:
    """The bytes of a tensor or buffer.

    Args:
        what: the argument's name, for messages.
        memory: a contiguous CPU tensor, or anything that ``memoryview`` takes, C-contiguous.
        written: bytes will be put there.

    Raises:
        AccelTypeError: neither a tensor nor a buffer.
        AccelValueError: another device, not contiguous, read-only, or part of an autograd graph.
    """
    if isinstance(memory, torch.Tensor):
        return _span_of_tensor(what, memory, written)
    try:
        view = memoryview(memory)
    except TypeError:
        raise AccelTypeError(
            f"{what}: expected a torch.Tensor or a buffer, got {type(memory).__name__}"
        ) from None
    if not view.c_contiguous:
        raise AccelValueError(f"{what}: expected contiguous memory, got strides {view.strides}")
    if written and view.readonly:
        raise AccelValueError(f"{what}: expected writable memory, got a read-only buffer")
    if view.nbytes == 0:
        return Span(0, 0, view)
    array = np.frombuffer(view, dtype=np.uint8)  # keeps the buffer exported: it cannot be resized meanwhile
    return Span(int(array.ctypes.data), view.nbytes, array)


def _span_of_tensor(what: str, tensor: torch.Tensor, written: bool) -> Span:
    if tensor.layout is not torch.strided or not tensor.is_cpu:
        raise AccelValueError(
            f"{what}: expected a dense CPU tensor, got {tensor.layout} on {tensor.device}; copy it to the CPU"
        )
    if not tensor.is_contiguous():
        raise AccelValueError(
            f"{what}: expected a contiguous tensor, got shape {tuple(tensor.shape)}, stride {tensor.stride()}"
        )
    if written and tensor.requires_grad and tensor.grad_fn is not None:
        raise AccelValueError(f"{what}: is the result of a recorded operation; detach it first")
    storage = (
        tensor.untyped_storage()
    )  # the tensor itself may be given other memory (`x.data = ...`) meanwhile
    address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    # Memory that torch did not allocate may be a file mapped for reading, where writing ends the process.
    if written and nbytes and not storage.resizable() and not is_writable(address, nbytes):
        raise AccelValueError(f"{what}: expected writable memory, lies in a read-only mapping")
    return Span(address, nbytes, storage)
