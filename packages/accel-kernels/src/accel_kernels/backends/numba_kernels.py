"""The optimizer rules for numba, fp32 in and out.

Compiled at first use, which takes seconds; imported by ``portable`` alone.

No fast-math: the compiler may not fuse or reorder, so the bits equal the reference's. ``c`` holds the
coefficients as fp32 (see ``segments``), so that every operation stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..segments import Coefficients, Flag, Optimizer

_L2, _MOMENTUM, _FIRST, _NESTEROV = (int(flag) for flag in Flag)

_compile: Callable[[Callable[..., None]], Callable[..., None]] = numba.njit(
    parallel=True, error_model="numpy", nogil=True
)


@_compile
def _adam(p: Any, g: Any, m: Any, v: Any, c: Any, flags: int) -> None:
    for i in numba.prange(p.size):
        gi = g[i]
        if flags & _L2:
            gi = gi + p[i] * c[7]
        mi = m[i] * c[0] + gi * c[1]
        vi = v[i] * c[2] + (gi * gi) * c[3]
        m[i] = mi
        v[i] = vi
        update = (mi * c[6]) / (np.sqrt(vi) * c[4] + c[5])
        kept = p[i] if flags & _L2 else p[i] * c[7]
        p[i] = kept - update


@_compile
def _lion(p: Any, g: Any, m: Any, unused: Any, c: Any, flags: int) -> None:
    for i in numba.prange(p.size):
        x = m[i] * c[0] + g[i] * c[1]
        sign = np.float32(0.0)
        if x > 0:
            sign = np.float32(1.0)
        elif x < 0:
            sign = np.float32(-1.0)
        p[i] = p[i] * c[5] - sign * c[4]
        m[i] = m[i] * c[2] + g[i] * c[3]


@_compile
def _adagrad(p: Any, g: Any, total: Any, unused: Any, c: Any, flags: int) -> None:
    for i in numba.prange(p.size):
        gi = g[i]
        if flags & _L2:
            gi = gi + p[i] * c[2]
        ti = total[i] + gi * gi
        total[i] = ti
        p[i] = p[i] - (gi * c[0]) / (np.sqrt(ti) + c[1])


@_compile
def _sgd(p: Any, g: Any, buffer: Any, unused: Any, c: Any, flags: int) -> None:
    for i in numba.prange(p.size):
        gi = g[i]
        if flags & _L2:
            gi = gi + p[i] * c[3]
        if flags & _MOMENTUM:
            bi = gi
            if not flags & _FIRST:
                bi = buffer[i] * c[1] + gi * c[2]
            buffer[i] = bi
            gi = gi + bi * c[1] if flags & _NESTEROV else bi
        p[i] = p[i] - gi * c[0]


_KERNELS: dict[Optimizer, Callable[..., None]] = {
    Optimizer.ADAM: _adam,
    Optimizer.LION: _lion,
    Optimizer.ADAGRAD: _adagrad,
    Optimizer.SGD: _sgd,
}
_NOTHING = np.zeros(0, np.float32)


def run(
    optimizer: Optimizer, p: Tensor, g: Tensor, states: Sequence[Tensor], coefficients: Coefficients
) -> None:
    """Update one piece in place; all tensors fp32, flat, contiguous, on the CPU."""
    arrays = [tensor.detach().numpy() for tensor in (p, g, *states)]
    arrays += [_NOTHING] * (4 - len(arrays))
    before = numba.get_num_threads()
    numba.set_num_threads(min(torch.get_num_threads(), before))
    try:
        _KERNELS[optimizer](*arrays, np.array(coefficients.c, np.float32), coefficients.flags)
    finally:
        numba.set_num_threads(before)
