"""The C++ back end of the inference ops: hands addresses and strides to the extension, as ``backends.cpu`` does."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dispatch import AttentionOptions
from ...errors import AccelValueError
from ...isa import chosen_cpu_isa
from ...native import cpu
from ...recording import keep

assert cpu is not None  # dispatch loads this module only where the extension is there
_cpu = cpu

# csrc/include/accel/kernels.h: enum class DType; accel/inference.h: enum class WeightKind
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_DENSE, _INT8, _INT4 = range(3)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Address, and elements from one value of each of two row indices to the next; a vector is one row."""
    if x is None:
        return 0, 0, 0
    if x.dim() == 3:
        return x.data_ptr(), x.stride(0), x.stride(1)
    return x.data_ptr(), x.stride(0) if x.dim() == 2 else 0, 0


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
    keep(q, k_cache, v_cache, block_tables, query_starts, context_lens, out)
    keep(options.alibi_slopes, options.k_scale, options.v_scale)
    num_tokens, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    try:
        _cpu.paged_attention(
            *_row_strides(q),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            _address(options.k_scale),
            _address(options.v_scale),
            block_tables.data_ptr(),
            block_tables.stride(0),
            block_tables.shape[1],
            query_starts.data_ptr(),
            context_lens.data_ptr(),
            _address(options.alibi_slopes),
            out.data_ptr(),
            num_tokens,
            context_lens.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            num_blocks,
            block_size,
            options.window,
            options.scale,
            options.softcap,
            _DTYPE_CODES[q.dtype],
            torch.get_num_threads(),
            chosen_cpu_isa(),
        )
    except ValueError as error:
        raise AccelValueError(f"paged_attention: {error}") from None


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
    keep(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    num_blocks, num_heads, block_size, head_dim = k_cache.shape
    try:
        _cpu.write_kv(
            *_row_strides(k),
            *_row_strides(v),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            _address(k_scale),
            _address(v_scale),
            slots.data_ptr(),
            slots.shape[0],
            num_heads,
            head_dim,
            num_blocks,
            block_size,
            _DTYPE_CODES[k.dtype],
            torch.get_num_threads(),
            chosen_cpu_isa(),
        )
    except ValueError as error:
        raise AccelValueError(f"write_kv: {error}") from None


def _linear(
    kind: int,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    out: Tensor,
) -> None:
    keep(x, weight, scale, zero, bias, out)
    _cpu.linear(
        kind,
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        _address(scale),
        _address(zero),
        _address(bias),
        out.data_ptr(),
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        group,
        _DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    _linear(_DENSE, x, weight, None, None, bias, 0, out)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    _linear(_INT8, x, weight, scale, None, bias, 0, out)


def linear_int4(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out: Tensor,
) -> None:
    """See ``dispatch.InferenceBackend``."""
    _linear(_INT4, x, packed, scale, zero, bias, group_size, out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, weight_offset: float, out: Tensor
) -> None:
    """See ``dispatch.InferenceBackend``."""
    keep(x, weight, residual, out)
    dim = x.shape[-1]
    _cpu.rms_norm(
        *_row_strides(x),
        *_row_strides(residual),
        *_row_strides(out),
        weight.data_ptr(),
        _DTYPE_CODES[weight.dtype],
        x.numel() // dim,
        x.shape[1] if x.dim() == 3 else 1,
        dim,
        eps,
        weight_offset,
        _DTYPE_CODES[x.dtype],
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )


def rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> None:
    """See ``dispatch.InferenceBackend``."""
    keep(q, k, cos, sin, positions)
    for x in (q, k):
        if x is None:
            continue
        try:
            _cpu.rotary(
                *_row_strides(x),
                x.shape[1],
                cos.data_ptr(),
                cos.stride(0),
                sin.data_ptr(),
                sin.stride(0),
                cos.shape[0],
                positions.data_ptr(),
                x.shape[0],
                cos.shape[1],
                interleaved,
                _DTYPE_CODES[x.dtype],
                torch.get_num_threads(),
                chosen_cpu_isa(),
            )
        except ValueError as error:
            raise AccelValueError(f"rotary: {error}") from None


def gated(activation: str, gate_up: Tensor, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    keep(gate_up, out)
    _cpu.gated(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        out.stride(0),
        out.shape[0],
        out.shape[1],
        activation == "gelu_tanh",
        _DTYPE_CODES[gate_up.dtype],
        torch.get_num_threads(),
        chosen_cpu_isa(),
    )
