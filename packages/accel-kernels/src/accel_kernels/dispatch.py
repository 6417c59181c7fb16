"""Which back end runs a call: the fastest for the tensors' device that is available, or the one asked for.

A back end is a module with three functions (``Backend``). Nothing is imported, compiled or initialised before
a call needs it. Next: the module chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from . import native
from .errors import AccelValueError, BackendUnavailableError
from .segments import Optimizer, Segment

BACKENDS = ("cpu", "cuda", "portable", "reference")


class Backend(Protocol):
    """What a back end provides; arguments have been checked."""

    def step(
        self,
        optimizer: Optimizer,
        param: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        segments: Sequence[Segment],
        grad_scale: float | Tensor,
        low_precision: Tensor | None,
    ) -> None:
        """One optimizer step in place."""

    def add_norm(self, grad: Tensor, scale: float, out: Tensor) -> None:
        """Add the sum of squares of ``scale * grad`` and the non-finite count to ``out``."""

    def cast(self, src: Tensor, dst: Tensor, scale: float, stochastic: bool, seed: int) -> None:
        """Scaled copy with rounding."""


@functools.cache
def has_module(name: str) -> bool:
    """Whether a module could be imported; does not import it."""
    return importlib.util.find_spec(name) is not None


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device_type``, or None if it can."""
    if backend in ("portable", "reference"):
        return None
    if backend != device_type:
        return f"works on {backend} tensors, got {device_type} ones"
    if backend == "cpu":
        return native.why_not
    return (
        None if has_module("cupy") else "CuPy is not installed: pip install accel-kernels[cuda12] or [cuda13]"
    )


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f".backends.{name}", __package__))


def preferred(device_type: str) -> str:
    """The back end that runs for a device when none is asked for."""
    native_one = device_type if device_type in ("cpu", "cuda") else "portable"
    return native_one if why_unavailable(native_one, device_type) is None else "portable"


def choose(op: str, device: torch.device, backend: str | None) -> Backend:
    """The back end for tensors on ``device``.

    Raises:
        AccelValueError: ``backend`` is not a name in ``BACKENDS``.
        BackendUnavailableError: it is, but cannot run here.
    """
    if backend is None:
        return _load(preferred(device.type))
    if backend not in BACKENDS:
        raise AccelValueError(f"{op}: backend: expected None or one of {BACKENDS}, got {backend!r}")
    reason = why_unavailable(backend, device.type)
    if reason is not None:
        raise BackendUnavailableError(
            f"{op}: backend {backend!r}: {reason}; backend=None takes the best one here"
        )
    return _load(backend)
