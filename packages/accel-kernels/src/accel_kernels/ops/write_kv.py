"""New keys and values into a paged cache."""

from __future__ import annotations

from torch import Tensor

from ..checks_inference import FLOATS, INT8, INT64, SINGLE, expect, expect_contiguous
from ..dispatch import choose_inference
from ..errors import AccelValueError

_OP = "write_kv"


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Copy the keys and values of T tokens to their slots in the cache, quantizing for an int8 one.

    An int8 cache holds ``round(x / s)`` (ties to even) for each token and head, with ``s`` = largest magnitude
    / 127 in ``k_scale``, ``v_scale``; every back end writes the same bits. A head with a NaN or an infinity in it is
    all NaN when it is read.

    Args:
        k: ``[T, Hkv, D]``, fp32, bf16 or fp16; may be a slice of a wider tensor.
        v: likewise.
        k_cache: ``[num_blocks, Hkv, block_size, D]``, contiguous, of k's dtype or int8; written.
        v_cache: likewise.
        slots: int64 ``[T]``: block * block_size + offset of each token, no two alike; a negative one skips it.
        k_scale: fp32 ``[num_blocks, Hkv, block_size]``, contiguous, for an int8 cache; written.
        v_scale: likewise.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout; on the CPU also slots out of range.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    expect(_OP, "k", k, FLOATS, (None, None, None))
    expect(_OP, "v", v, (k.dtype,), k.shape, k.device)
    num_tokens, num_heads, head_dim = k.shape
    cache_dtypes = (k.dtype,) if k_scale is None else INT8
    expect(_OP, "k_cache", k_cache, cache_dtypes, (None, num_heads, None, head_dim), k.device)
    expect(_OP, "v_cache", v_cache, cache_dtypes, k_cache.shape, k.device)
    expect(_OP, "slots", slots, INT64, (num_tokens,), k.device)
    if (k_scale is None) != (v_scale is None):
        raise AccelValueError(f"{_OP}: v_scale: expected k_scale and v_scale, or neither")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scales is not None:
            expect(_OP, name, scales, SINGLE, k_cache.shape[:3], k.device)
            expect_contiguous(_OP, name, scales)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect_contiguous(_OP, name, cache)
    chosen = choose_inference(_OP, k.device.type, k.dtype, backend)
    if k.numel():
        chosen.write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)
