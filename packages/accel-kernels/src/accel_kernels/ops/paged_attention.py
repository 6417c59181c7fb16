"""Attention of ragged batches over a paged cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks_inference import FLOATS, INT8, INT32, SINGLE, expect, expect_contiguous, expect_written
from ..dispatch import AttentionOptions, choose_inference
from ..errors import AccelValueError

_OP = "paged_attention"


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
    backend: str | None = None,
) -> Tensor:
    """Causal attention of the new tokens of S sequences to all their keys, which lie in blocks of a cache.

    Sequence s has ``context_lens[s]`` keys, those of this step included; its queries, rows
    ``query_starts[s]`` to ``query_starts[s + 1]`` of ``q``, are its last positions. Scores are
    ``scale * q.k``, then ``softcap * tanh(scores / softcap)`` if that is set, then ``+ slope * (key - query)``
    for ALiBi, then masked; all in fp32. Query heads ``h`` use key head ``h * Hkv // Hq``.

    On the ``cpu`` and ``cuda`` back ends a query's result does not depend, bit for bit, on what else is in the
    batch, how prompts were cut, where blocks lie or how many threads there are: every query reduces over keys
    in one order, in tiles counted from key 0.

    Args:
        q: ``[T, Hq, D]``, fp32, bf16 or fp16; may be a slice of a wider tensor.
        k_cache: ``[num_blocks, Hkv, block_size, D]``, contiguous, of q's dtype, or int8 with ``k_scale``.
        v_cache: likewise, with ``v_scale``.
        block_tables: int32 ``[S, B]``: ids of each sequence's blocks; those past its length are not looked at.
        query_starts: int32 ``[S + 1]``, from 0 to T.
        context_lens: int32 ``[S]``.
        scale: usually ``D ** -0.5``.
        window: a query sees only the last so many keys, itself included; 0 for all.
        softcap: 0 for none.
        alibi_slopes: fp32 ``[Hq]``.
        k_scale: fp32 ``[num_blocks, Hkv, block_size]``: what int8 keys are multiplied by.
        v_scale: likewise for values.
        out: ``[T, Hq, D]`` of q's dtype, contiguous; None makes one.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout; on the CPU also lengths and block ids out of range.
        BackendUnavailableError: ``backend`` cannot run here.

    Sources: Kwon et al., arXiv:2309.06180, section 4 (paged cache); Milakov & Gimelshein, arXiv:1805.02867,
    algorithm 3 (online softmax); Dao et al., arXiv:2205.14135, algorithm 1 (tiles).
    """
    expect(_OP, "q", q, FLOATS, (None, None, None))
    device = q.device
    num_tokens, num_heads, head_dim = q.shape
    cache_dtypes = (q.dtype,) if k_scale is None else INT8
    expect(_OP, "k_cache", k_cache, cache_dtypes, (None, None, None, head_dim), device)
    expect(_OP, "v_cache", v_cache, (k_cache.dtype,), k_cache.shape, device)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect_contiguous(_OP, name, cache)
    _, num_kv_heads, block_size, _ = k_cache.shape
    if (num_kv_heads < 1 or block_size < 1) and q.numel():
        raise AccelValueError(
            f"{_OP}: k_cache: expected heads and blocks of at least one key, got shape {tuple(k_cache.shape)}"
        )
    if num_heads % max(num_kv_heads, 1):
        raise AccelValueError(f"{_OP}: q: expected a multiple of {num_kv_heads} heads, got {num_heads}")
    expect(_OP, "block_tables", block_tables, INT32, (None, None), device)
    num_sequences = block_tables.shape[0]
    expect(_OP, "query_starts", query_starts, INT32, (num_sequences + 1,), device)
    expect(_OP, "context_lens", context_lens, INT32, (num_sequences,), device)
    if (k_scale is None) != (v_scale is None):
        raise AccelValueError(f"{_OP}: v_scale: expected k_scale and v_scale, or neither")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is not None:
            expect(_OP, name, scales, SINGLE, k_cache.shape[:3], device)
            expect_contiguous(_OP, name, scales)
    if alibi_slopes is not None:
        expect(_OP, "alibi_slopes", alibi_slopes, SINGLE, (num_heads,), device)
    if window < 0 or softcap < 0:
        raise AccelValueError(f"{_OP}: window, softcap: expected >= 0, got {window}, {softcap}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
    else:
        expect(_OP, "out", out, (q.dtype,), q.shape, device)
        expect_contiguous(_OP, "out", out)
        expect_written(_OP, "out", out, ("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
    chosen = choose_inference(_OP, device.type, q.dtype, backend)
    if num_tokens and num_heads and head_dim:
        options = AttentionOptions(float(scale), window, float(softcap), alibi_slopes, k_scale, v_scale)
        chosen.paged_attention(q, k_cache, v_cache, block_tables, query_starts, context_lens, options, out)
    return out
