"""The portable back end of the inference ops: plain torch, where torch has something faster than the reference.

Torch's own products are fast everywhere, but a row's bits may depend on how many rows there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import reference
from ...dispatch import AttentionOptions
from ...reference.attention import gather_cache
from .reference import gated, rms_norm, rotary, write_kv
from .values import check_attention

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


@torch.no_grad()
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
    """See ``dispatch.InferenceBackend``; torch's fused attention sequence by sequence, where it can be had."""
    check_attention(len(q), k_cache.shape, block_tables, query_starts, context_lens)
    if options.softcap > 0 or options.alibi_slopes is not None:  # 16-bit biases would be too coarse
        tensors = (q, k_cache, v_cache, block_tables, query_starts, context_lens)
        reference.paged_attention(*tensors, **options._asdict(), out=out)
        return
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for s, num_keys in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        n = rows.stop - rows.start
        if n == 0:
            continue
        blocks = block_tables[s, : -(-num_keys // k_cache.shape[2])]
        group = q.shape[1] // k_cache.shape[1]
        keys, values = (
            gather_cache(cache, scale, blocks, num_keys)
            .to(q.dtype)
            .transpose(0, 1)
            .repeat_interleave(group, 0)
            for cache, scale in ((k_cache, options.k_scale), (v_cache, options.v_scale))
        )
        attended = F.scaled_dot_product_attention(
            q[rows].transpose(0, 1).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=_seen(num_keys, n, options.window, q.device),
            scale=options.scale,
        )
        out[rows] = attended.squeeze(0).transpose(0, 1)


def _seen(num_keys: int, n: int, window: int, device: torch.device) -> Tensor:
    """Which keys the last ``n`` of ``num_keys`` positions see."""
    query = torch.arange(num_keys - n, num_keys, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device).unsqueeze(0)
    seen = key <= query
    return seen & (key > query - window) if window > 0 else seen


@torch.no_grad()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``."""
    out.copy_(F.linear(x, weight, bias))


@torch.no_grad()
def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See ``dispatch.InferenceBackend``; weights are rounded to the dtype of ``x``."""
    out.copy_(F.linear(x, reference.dequantize_int8(weight, scale).to(x.dtype), bias))


@torch.no_grad()
def linear_int4(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out: Tensor,
) -> None:
    """See ``dispatch.InferenceBackend``; weights are rounded to the dtype of ``x``."""
    weight = reference.dequantize_int4(packed, scale, zero, group_size)
    out.copy_(F.linear(x, weight.to(x.dtype), bias))
