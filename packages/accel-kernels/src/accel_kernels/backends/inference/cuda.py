"""The CUDA back end of the inference ops: Triton for attention, csrc/cuda through CuPy for the small ones.

On torch's current stream; nothing waits for the device. Dense and quantized products are torch's own (``portable``):
there a row's bits may depend on how many rows there are.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch
from torch import Tensor

from ...dispatch import AttentionOptions
from ..cuda import kernel, num_blocks, on_stream_of
from .portable import linear, linear_int4, linear_int8

__all__ = [
    "gated",
    "linear",
    "linear_int4",
    "linear_int8",
    "paged_attention",
    "rms_norm",
    "rotary",
    "write_kv",
]

# csrc/cuda/common.cuh; of a row's block, csrc/cuda/rows.cuh
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROW_THREADS = 128
_THREADS = 256


def _rows(x: Tensor | None) -> tuple[np.int64, np.int64, np.int64]:
    """Address and strides of token and head of ``[T, D]`` or ``[T, H, D]``; zeros for None."""
    if x is None:
        return np.int64(0), np.int64(0), np.int64(0)
    token, head = (x.stride(0) if x.dim() > 1 else 0), (x.stride(1) if x.dim() == 3 else 0)
    return np.int64(x.data_ptr()), np.int64(token), np.int64(head)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    options: AttentionOptions,
    out: Tensor,
) -> None:
    """See ``dispatch.InferenceBackend``."""
    module = importlib.import_module(".triton_attention", __package__)
    with torch.cuda.device(q.device):
        module.run(q, k_cache, v_cache, block_tables, query_starts, context_lens, options, out)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """See ``dispatch.InferenceBackend``."""
    num_tokens, num_heads, dim = k.shape
    expression = f"write_kv<{_DTYPE_CODES[k.dtype]}, {'false' if k_scale is None else 'true'}>"
    with on_stream_of(k):
        run = kernel("write_kv.cu", expression)
        for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            arguments = (
                *_rows(new),
                np.int64(cache.data_ptr()),
                np.int64(0 if scale is None else scale.data_ptr()),
                np.int64(slots.data_ptr()),
                np.int32(num_heads),
                np.int32(dim),
                np.int32(cache.shape[2]),
            )
            run((num_tokens * num_heads,), (_ROW_THREADS,), arguments)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, weight_offset: float, out: Tensor
) -> None:
    """See ``dispatch.InferenceBackend``."""
    dim = x.shape[-1]
    expression = f"rms_norm<{_DTYPE_CODES[x.dtype]}, {_DTYPE_CODES[weight.dtype]}>"
    arguments = (
        *_rows(x),
        *_rows(residual),
        *_rows(out),
        np.int64(weight.data_ptr()),
        np.int32(x.shape[1] if x.dim() == 3 else 1),
        np.int32(dim),
        np.float32(eps),
        np.float32(weight_offset),
    )
    with on_stream_of(x):
        kernel("rms_norm.cu", expression)((x.numel() // dim,), (_ROW_THREADS,), arguments)


def rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> None:
    """See ``dispatch.InferenceBackend``."""
    half = cos.shape[1]
    with on_stream_of(q):
        run = kernel("rotary.cu", f"rotary<{_DTYPE_CODES[q.dtype]}>")
        for x in (q, k):
            if x is None or x.shape[1] == 0:
                continue
            arguments = (
                *_rows(x),
                np.int32(x.shape[1]),
                np.int64(cos.data_ptr()),
                np.int64(cos.stride(0)),
                np.int64(sin.data_ptr()),
                np.int64(sin.stride(0)),
                np.int64(positions.data_ptr()),
                np.int64(x.shape[0]),
                np.int32(half),
                np.int32(interleaved),
            )
            run((num_blocks(x.shape[0] * x.shape[1] * half, x.device),), (_THREADS,), arguments)


def gated(activation: str, gate_up: Tensor, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    gelu = "true" if activation == "gelu_tanh" else "false"
    arguments = (
        np.int64(gate_up.data_ptr()),
        np.int64(gate_up.stride(0)),
        np.int64(out.data_ptr()),
        np.int64(out.stride(0)),
        np.int64(out.shape[0]),
        np.int64(out.shape[1]),
    )
    with on_stream_of(gate_up):
        run = kernel("gated.cu", f"gated<{_DTYPE_CODES[gate_up.dtype]}, {gelu}>")
        run((num_blocks(out.numel(), out.device),), (_THREADS,), arguments)
