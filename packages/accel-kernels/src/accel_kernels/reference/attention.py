"""What paged attention means: gather a sequence's keys and values, and attend to them in fp32, head by head."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_cache(cache: Tensor, scale: Tensor | None, blocks: Tensor, num_keys: int) -> Tensor:
    """A sequence's keys (or values) as fp32 ``[num_keys, Hkv, D]``."""
    held = cache[blocks.long()].to(torch.float32)  # [blocks, Hkv, block_size, D]
    if scale is not None:
        held = held * scale[blocks.long()].unsqueeze(-1)
    return held.transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:num_keys]


def sequence_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """One sequence: fp32 ``q`` ``[n, Hq, D]`` are the last n positions of ``keys``, ``values`` ``[L, Hkv, D]``."""
    n, num_heads, _ = q.shape
    num_keys = keys.shape[0]
    group = num_heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    query = torch.arange(num_keys - n, num_keys, device=q.device).unsqueeze(1)
    key = torch.arange(num_keys, device=q.device).unsqueeze(0)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.view(-1, 1, 1) * (key - query)
    seen = key <= query
    if window > 0:
        seen = seen & (key > query - window)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)


@torch.no_grad()
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``accel_kernels.paged_attention``."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    starts, lengths = query_starts.tolist(), context_lens.tolist()
    for s, num_keys in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        if rows.start == rows.stop:
            continue
        blocks = block_tables[s, : -(-num_keys // k_cache.shape[2])]
        out[rows] = sequence_attention(
            q[rows].to(torch.float32),
            gather_cache(k_cache, k_scale, blocks, num_keys),
            gather_cache(v_cache, v_scale, blocks, num_keys),
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        ).to(q.dtype)
    return out


@torch.no_grad()
def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See ``accel_kernels.write_kv``."""
    kept = (slots >= 0).nonzero().squeeze(1)
    block_size = k_cache.shape[2]
    block, offset = slots[kept] // block_size, slots[kept] % block_size
    for new, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = new[kept]
        if scale is None:
            cache[block, :, offset] = rows.to(cache.dtype)
        else:
            quantized, amax_over_127 = quantize_heads(rows)
            cache[block, :, offset] = quantized
            scale[block, :, offset] = amax_over_127


def quantize_heads(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 over the last dim: values, and scale = largest magnitude / 127 (0 for a row of zeros).

    A row with a NaN or an infinity in it is NaN: zeros, and so its scale.
    """
    x = rows.to(torch.float32)
    largest = x.abs().amax(dim=-1)
    scale = largest / 127.0 + largest * 0.0
    quotient = x / scale.unsqueeze(-1)
    quotient = torch.where(scale.unsqueeze(-1) > 0, quotient, torch.zeros_like(quotient))
    return quotient.round().clamp(-127, 127).to(torch.int8), scale
