"""Attention of a ragged batch over the paged cache: the one place that calls the kernels.

In: queries, keys and values of the tokens of a forward, as a layer makes them. New keys and values go to their slots,
then every query attends to its sequence's blocks. The batch and the cache are arguments; there is no context beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import accel_kernels
from torch import Tensor

from .batch import RaggedBatch
from .kv_cache import KVCache


@dataclass(frozen=True)
class AttentionSpec:
    """How scores are made.

    Attributes:
        scale: of queries times keys.
        window: a token sees itself and `window - 1` before it; 0: all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0: as they are.
        alibi_slopes: float32 `[heads]`, added times the distance; None: not.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None


def attend(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    layer: int,
    batch: RaggedBatch,
    cache: KVCache,
    spec: AttentionSpec,
) -> Tensor:
    """Store this forward's keys and values of a layer and attend.

    Args:
        q_THD: queries, `[T, heads, head_dim]`.
        k_TGD: keys, `[T, kv heads, head_dim]`.
        v_TGD: values, likewise.
        layer: its number in the cache.
        batch: whose tokens these are.
        cache: written at `batch.slots_T`, read through `batch.block_tables_SB`.
        spec: how scores are made.

    Returns:
        `[T, heads, head_dim]`, of the queries' dtype.
    """
    k_scale = cache.key_scales[layer] if cache.key_scales else None
    v_scale = cache.value_scales[layer] if cache.value_scales else None
    keys, values = cache.keys[layer], cache.values[layer]
    accel_kernels.write_kv(k_TGD, v_TGD, keys, values, batch.slots_T, k_scale=k_scale, v_scale=v_scale)
    return accel_kernels.paged_attention(
        q_THD,
        keys,
        values,
        batch.block_tables_SB,
        batch.query_starts_S1,
        batch.context_lens_S,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        alibi_slopes=spec.alibi_slopes,
        k_scale=k_scale,
        v_scale=v_scale,
    )
