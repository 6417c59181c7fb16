"""The CUDA back end: csrc/cuda compiled by NVRTC through CuPy at first use, on torch's current stream.

Each template instance is compiled when first needed (about a second) and cached by CuPy on disk. Nothing here waits
for the device. One kernel launch a segment; two a tensor for the norm.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference import rounding_key
from ..segments import NUM_COEFFICIENTS, Optimizer, Segment

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# No fused multiply-add: the same bits as the CPU kernels (csrc/cuda/common.cuh).
OPTIONS = ("-std=c++17", "-fmad=false")

_THREADS = 256  # csrc/cuda/norm.cu relies on it
_GROUP = 4  # elements a thread handles at a time
_BLOCKS_PER_SM = 16
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_DTYPE = 3
_ZEROS = (0.0,) * NUM_COEFFICIENTS


def load_source(name: str) -> str:
    """A source file with its local headers written out in place, each once.

    CuPy's cache of compiled kernels looks at this text alone; a header that it included itself could change unseen.
    """
    seen: set[str] = set()

    def expand(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (SOURCES / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"$', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(name)


@functools.cache
def kernel(file: str, expression: str) -> Any:
    """A template instance, ready to be launched."""
    import cupy

    module = cupy.RawModule(code=load_source(file), options=OPTIONS, name_expressions=[expression])
    return module.get_function(expression)


@contextlib.contextmanager
def on_stream_of(tensor: Tensor) -> Iterator[None]:
    """The tensor's device and torch's current stream there, for CuPy."""
    import cupy

    with torch.cuda.device(tensor.device):
        stream = torch.cuda.current_stream(tensor.device).cuda_stream
        with cupy.cuda.ExternalStream(stream):
            yield


@functools.cache
def _max_blocks(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * _BLOCKS_PER_SM


def num_blocks(numel: int, device: torch.device) -> int:
    """How many blocks of a grid-stride loop."""
    per_block = _THREADS * _GROUP
    return max(1, min((numel + per_block - 1) // per_block + 1, _max_blocks(device)))


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
    name = optimizer.name.lower()
    low_code = _NO_DTYPE if low_precision is None else _DTYPE_CODES[low_precision.dtype]
    pointers = [state.data_ptr() for state in states] + [0] * (2 - len(states))
    is_tensor = isinstance(grad_scale, Tensor)
    scale_pointer = grad_scale.data_ptr() if isinstance(grad_scale, Tensor) else 0
    with on_stream_of(param):
        launch = kernel(f"{name}.cu", f"{name}_step<{_DTYPE_CODES[grad.dtype]}, {low_code}>")
        for segment in segments:
            numel = segment.stop - segment.start
            if numel == 0:
                continue
            c, flags = segment.coefficients()
            arguments = (
                np.int64(param.data_ptr()),
                np.int64(grad.data_ptr()),
                np.int64(pointers[0]),
                np.int64(pointers[1]),
                np.int64(0 if low_precision is None else low_precision.data_ptr()),
                np.int64(segment.start),
                np.int64(segment.stop),
                np.int64(scale_pointer),
                np.float32(1.0 if is_tensor else float(grad_scale)),
                *(np.float32(value) for value in (*c, *_ZEROS[len(c) :])),
                np.uint32(flags),
            )
            launch((num_blocks(numel, param.device),), (_THREADS,), arguments)


def add_norm(grad: Tensor, scale: float, out: Tensor) -> None:
    """See ``dispatch.Backend``."""
    blocks = num_blocks(grad.numel(), grad.device)
    with on_stream_of(grad):
        partial = torch.empty(2 * blocks, dtype=torch.float64, device=grad.device)
        arguments = (np.int64(grad.data_ptr()), np.int64(grad.numel()), np.int64(partial.data_ptr()))
        code = _DTYPE_CODES[grad.dtype]
        kernel("norm.cu", f"norm_partial<{code}>")((blocks,), (_THREADS,), arguments)
        finish = (
            np.int64(partial.data_ptr()),
            np.int32(blocks),
            np.float64(scale),
            np.int64(out.data_ptr()),
        )
        kernel("norm.cu", "norm_finish")((1,), (_THREADS,), finish)


def cast(src: Tensor, dst: Tensor, scale: float, stochastic: bool, seed: int) -> None:
    """See ``dispatch.Backend``."""
    expression = f"cast_copy<{_DTYPE_CODES[src.dtype]}, {_DTYPE_CODES[dst.dtype]}, {'true' if stochastic else 'false'}>"
    arguments = (
        np.int64(src.data_ptr()),
        np.int64(dst.data_ptr()),
        np.int64(src.numel()),
        np.float32(scale),
        np.uint64(rounding_key(seed)),
    )
    with on_stream_of(src):
        blocks = num_blocks(src.numel(), src.device)
        kernel("cast.cu", expression)((blocks,), (_THREADS,), arguments)
