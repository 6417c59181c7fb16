"""Which back end runs a call: the fastest for the tensors' device that is available, or the one asked for.

A back end is a module with three functions (``Backend``) for training, and one with eight (``InferenceBackend``)
for inference. Nothing is imported, compiled or initialised before a call needs it. Next: the module chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from . import native
from .errors import AccelValueError, BackendUnavailableError
from .recording import refuse_while_recording
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


class AttentionOptions(NamedTuple):
    """How ``paged_attention`` scores keys; see there."""

    scale: float
    window: int
    softcap: float
    alibi_slopes: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class InferenceBackend(Protocol):
    """What a back end provides for inference; arguments have been checked, ``out`` is there."""

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        options: AttentionOptions,
        out: Tensor,
    ) -> None:
        """Attention over a paged cache."""

    def write_kv(
        self,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slots: Tensor,
        k_scale: Tensor | None,
        v_scale: Tensor | None,
    ) -> None:
        """New keys and values into the cache."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Dense product."""

    def linear_int8(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Product with int8 weights."""

    def linear_int4(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        out: Tensor,
    ) -> None:
        """Product with int4 weights."""

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor,
        eps: float,
        residual: Tensor | None,
        weight_offset: float,
        out: Tensor,
    ) -> None:
        """RMSNorm, after adding to the residual where there is one."""

    def rotary(
        self, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
    ) -> None:
        """Rotary embedding in place."""

    def gated(self, activation: str, gate_up: Tensor, out: Tensor) -> None:
        """``activation(gate) * up``; "silu" or "gelu_tanh"."""


# What an inference op needs on CUDA; those that are not here run in plain torch.
_CUDA_NEEDS = {
    "paged_attention": "triton",
    "write_kv": "cupy",
    "rms_norm": "cupy",
    "rotary": "cupy",
    "silu_mul": "cupy",
    "gelu_mul": "cupy",
}
INFERENCE_OPS = (*_CUDA_NEEDS, "linear", "linear_int8", "linear_int4")
_CPU_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def why_no_module(name: str) -> str | None:
    """Why a module cannot be imported, or None if it can, and then has been."""
    if importlib.util.find_spec(name) is None:
        return "is not installed"
    try:
        importlib.import_module(name)
    except (
        Exception
    ) as error:  # installed for another driver, another Python, another numpy: anything may come
        return f"does not import: {error}"
    return None


def why_unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device_type``, or None if it can."""
    if backend in ("portable", "reference"):
        return None
    if backend != device_type:
        return f"works on {backend} tensors, got {device_type} ones"
    if backend == "cpu":
        return native.why_not
    reason = why_no_module("cupy")
    return None if reason is None else f"CuPy {reason}: pip install accel-kernels[cuda12] or [cuda13]"


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f".backends.{name}", __package__))


def preferred(device_type: str) -> str:
    """The back end that runs for a device when none is asked for."""
    native_one = device_type if device_type in ("cpu", "cuda") else "portable"
    return native_one if why_unavailable(native_one, device_type) is None else "portable"


def choose_name(op: str, device: torch.device, backend: str | None) -> str:
    """The name of the back end for tensors on ``device``: the best one, or the one asked for.

    Raises:
        AccelValueError: ``backend`` is not a name in ``BACKENDS``.
        BackendUnavailableError: it is, but cannot run here.
    """
    refuse_while_recording(op)
    if backend is None:
        return preferred(device.type)
    if backend not in BACKENDS:
        raise AccelValueError(f"{op}: backend: expected None or one of {BACKENDS}, got {backend!r}")
    reason = why_unavailable(backend, device.type)
    if reason is not None:
        raise BackendUnavailableError(
            f"{op}: backend {backend!r}: {reason}; backend=None takes the best one here"
        )
    return backend


def choose(op: str, device: torch.device, backend: str | None) -> Backend:
    """The back end for tensors on ``device``; raises as ``choose_name`` does."""
    return _load(choose_name(op, device, backend))


def why_inference_unavailable(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run an inference op on such tensors, or None if it can."""
    if backend == "cuda" == device_type:
        needs = _CUDA_NEEDS.get(op)
        if needs is None:
            return "torch's own product is used there: backend='portable'"
        if needs == "triton":
            reason = why_no_module("triton")
            return None if reason is None else f"Triton {reason}"
        return why_unavailable(backend, device_type)
    if backend == "cpu" == device_type and native.cpu is not None and dtype not in _CPU_DTYPES:
        return f"has kernels for {' and '.join(map(str, _CPU_DTYPES))}, got {dtype}"
    return why_unavailable(backend, device_type)


@functools.cache
def choose_inference(op: str, device_type: str, dtype: torch.dtype, backend: str | None) -> InferenceBackend:
    """The back end of an inference op for tensors of ``dtype`` on a device.

    Raises:
        AccelValueError: ``backend`` is not a name in ``BACKENDS``.
        BackendUnavailableError: it is, but cannot run here.
    """
    if backend is None:
        best = device_type if device_type in ("cpu", "cuda") else "portable"
        backend = best if why_inference_unavailable(op, best, device_type, dtype) is None else "portable"
    elif backend not in BACKENDS:
        raise AccelValueError(f"{op}: backend: expected None or one of {BACKENDS}, got {backend!r}")
    reason = why_inference_unavailable(op, backend, device_type, dtype)
    if reason is not None:
        raise BackendUnavailableError(
            f"{op}: backend {backend!r}: {reason}; backend=None takes the best one here"
        )
    return cast(InferenceBackend, importlib.import_module(f".backends.inference.{backend}", __package__))
