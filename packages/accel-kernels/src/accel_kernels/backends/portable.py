"""The portable back end: numba for CPU optimizer steps if installed, else plain torch in cache-sized pieces.

Pieces keep the reference's temporaries in the processor's caches instead of main memory; every op here is
elementwise or a sum, so cutting changes no result (the norm: only the order of fp64 additions). On other
devices than the CPU the reference runs on the whole tensor.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..dispatch import why_no_module
from ..segments import Optimizer, Segment

# 64 Ki elements: five fp32 tensors and the temporaries fit a core's 1-2 MiB second-level cache.
_PIECE = 1 << 16
# numba has no 16-bit floats: gradients are widened and copies narrowed by torch, a piece at a time.
_NUMBA_PIECE = 1 << 20


@functools.cache
def _numba_kernels() -> tuple[ModuleType | None, int]:
    """The numba kernels, or None, and the process that they belong to."""
    if why_no_module("numba") is not None:
        return None, 0
    return importlib.import_module(".numba_kernels", __package__), os.getpid()


def _pieces(segments: Sequence[Segment], length: int) -> Iterator[Segment]:
    for segment in segments:
        for start in range(segment.start, segment.stop, length):
            yield replace(segment, start=start, stop=min(start + length, segment.stop))


@torch.no_grad()
def step(
    optimizer: Optimizer,
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    segments: Sequence[Segment],
    grad_scale: float | Tensor,
    low_precision: Tensor | None,
) -> None:
    """See ``dispatch.Backend``."""
    if param.device.type != "cpu":
        reference.step(optimizer, param, grad, states, segments, grad_scale, low_precision)
        return
    kernels, owner = _numba_kernels()
    if kernels is None or owner != os.getpid():  # numba's threads do not survive a fork: it ends the process
        pieces = list(_pieces(segments, _PIECE))
        reference.step(optimizer, param, grad, states, pieces, grad_scale, low_precision)
        return
    for piece in _pieces(segments, _NUMBA_PIECE):
        part = slice(piece.start, piece.stop)
        g = grad[part].to(torch.float32) * grad_scale
        kernels.run(optimizer, param[part], g, [state[part] for state in states], piece.coefficients())
        if low_precision is not None:
            low_precision[part].copy_(param[part])


def add_norm(grad: Tensor, scale: float, out: Tensor) -> None:
    """See ``dispatch.Backend``."""
    pieces = torch.split(grad, _PIECE) if grad.device.type == "cpu" and grad.numel() > 0 else [grad]
    for piece in pieces:
        reference.grad_norm_scale(piece, scale=scale, out=out)


def cast(src: Tensor, dst: Tensor, scale: float, stochastic: bool, seed: int) -> None:
    """See ``dispatch.Backend``."""
    length = _PIECE if src.device.type == "cpu" else max(src.numel(), 1)
    for start in range(0, src.numel(), length):
        part = slice(start, start + length)
        reference.cast_copy(
            src[part], dst[part], scale=scale, stochastic=stochastic, seed=seed, first_index=start
        )
