"""Which instruction set the CPU kernels use: the best one here, or the one that a test asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from . import native
from .errors import AccelValueError, BackendUnavailableError

# Empty: the best. Per thread and per async task, so that one caller's choice is not another's.
_chosen: ContextVar[str] = ContextVar("accel_kernels_cpu_isa", default="")


def available_cpu_isas() -> tuple[str, ...]:
    """Instruction sets the C++ kernels can use here, best first; empty where the extension is not built."""
    return () if native.cpu is None else tuple(native.cpu.isas())


def chosen_cpu_isa() -> str:
    """The name set by ``set_cpu_isa`` here, or ``""`` for the best."""
    return _chosen.get()


@contextlib.contextmanager
def set_cpu_isa(name: str) -> Iterator[None]:
    """Make the C++ kernels use one instruction set within a ``with`` block, in this thread.

    Args:
        name: one of ``available_cpu_isas()``: ``"amx"`` (for the inference ops; the others then use AVX-512),
            ``"avx512"``, ``"avx2"``, ``"baseline"``.

    Raises:
        BackendUnavailableError: the extension is not built.
        AccelValueError: this processor (or build) does not have it.
    """
    if native.cpu is None:
        raise BackendUnavailableError(f"set_cpu_isa: {native.why_not}")
    if name not in available_cpu_isas():
        raise AccelValueError(f"set_cpu_isa: expected one of {available_cpu_isas()}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)
