"""The C++ back end: hands addresses to the extension, which runs without the GIL on torch's threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..isa import chosen_cpu_isa
from ..native import cpu
from ..reference import rounding_key
from ..segments import Optimizer, Segment, pack

assert cpu is not None  # dispatch loads this module only where the extension is there
_cpu = cpu

# csrc/include/accel/kernels.h: enum class DType
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_DTYPE = 3


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
    _cpu.step(
        optimizer,
        param.data_ptr(),
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        states[0].data_ptr() if states else 0,
        states[1].data_ptr() if len(states) > 1 else 0,
        0 if low_precision is None else low_precision.data_ptr(),
        _NO_DTYPE if low_precision is None else DTYPE_CODES[low_precision.dtype],
        pack(segments),
        float(grad_scale),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def step_table(optimizer: Optimizer, rows: bytes, segments: Sequence[Segment], grad_scale: float) -> None:
    """One call for the rows that ``tables`` packed."""
    _cpu.step_table(optimizer, rows, pack(segments), grad_scale, torch.get_num_threads(), chosen_cpu_isa())


def add_norm(grad: Tensor, scale: float, out: Tensor) -> None:
    """See ``dispatch.Backend``."""
    _cpu.norm(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        grad.numel(),
        scale,
        out.data_ptr(),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def cast(src: Tensor, dst: Tensor, scale: float, stochastic: bool, seed: int) -> None:
    """See ``dispatch.Backend``."""
    _cpu.cast_copy(
        src.data_ptr(),
        DTYPE_CODES[src.dtype],
        dst.data_ptr(),
        DTYPE_CODES[dst.dtype],
        src.numel(),
        scale,
        stochastic,
        rounding_key(seed),
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )
