"""``reference`` as a back end of the inference ops: the plain torch statement of each."""

from __future__ import annotations

from torch import Tensor

from ... import reference
from ...dispatch import AttentionOptions
from .values import check_attention, check_positions, check_slots


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
    check_attention(len(q), k_cache.shape, block_tables, query_starts, context_lens)
    tensors = (q, k_cache, v_cache, block_tables, query_starts, context_lens)
    reference.paged_attention(*tensors, **options._asdict(), out=out)


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
    check_slots(slots, k_cache.shape[0] * k_cache.shape[2])
    reference.write_kv(k, v, k_cache, v_cache, slots, k_scale=k_scale, v_scale=v_scale)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    reference.linear(x, weight, bias, out=out)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    reference.linear_int8(x, weight, scale, bias, out=out)


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
    reference.linear_int4(x, packed, scale, zero, bias, group_size=group_size, out=out)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, weight_offset: float, out: Tensor
) -> None:
    """See ``dispatch.InferenceBackend``."""
    reference.rms_norm(x, weight, eps, residual=residual, weight_offset=weight_offset, out=out)


def rotary(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> None:
    """See ``dispatch.InferenceBackend``."""
    check_positions(positions, cos.shape[0])
    reference.rotary(q, k, cos, sin, positions, interleaved=interleaved)


def gated(activation: str, gate_up: Tensor, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    (reference.silu_mul if activation == "silu" else reference.gelu_mul)(gate_up, out=out)
