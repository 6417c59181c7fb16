"""Rotary position embedding, in place."""

from __future__ import annotations

from torch import Tensor

from ..checks_inference import FLOATS, INT64, SINGLE, expect, expect_written
from ..dispatch import choose_inference
from ..errors import AccelValueError

_OP = "rotary"


def rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> None:
    """Rotate pairs of elements of each head by the angles of the token's position, in fp32, rounded once.

    With R = 2 * cos.shape[1], element i < R / 2 is paired with i + R / 2 (as in Llama), or 2i with 2i + 1 if
    ``interleaved`` (as in GPT-J). Elements from R on are left alone (partial rotary embedding).

    Args:
        q: ``[T, Hq, D]``, fp32, bf16 or fp16; updated; may be a slice of a wider tensor.
        k: ``[T, Hk, D]``, likewise, or None.
        cos: fp32 ``[P, R / 2]``, R <= D: a row for each position.
        sin: likewise.
        positions: int64 ``[T]``, each below P.
        interleaved: which elements make a pair.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout; on the CPU also positions out of range.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Su et al., arXiv:2104.09864, equation 34.
    """
    expect(_OP, "q", q, FLOATS, (None, None, None))
    num_tokens, _, head_dim = q.shape
    expect_written(_OP, "q", q)
    if k is not None:
        expect(_OP, "k", k, (q.dtype,), (num_tokens, None, head_dim), q.device)
        expect_written(_OP, "k", k)
    expect(_OP, "cos", cos, SINGLE, (None, None), q.device)
    expect(_OP, "sin", sin, SINGLE, cos.shape, q.device)
    expect(_OP, "positions", positions, INT64, (num_tokens,), q.device)
    if 2 * cos.shape[1] > head_dim:
        raise AccelValueError(f"{_OP}: cos: expected at most {head_dim // 2} columns, got {cos.shape[1]}")
    chosen = choose_inference(_OP, q.device.type, q.dtype, backend)
    if num_tokens and cos.shape[1]:
        chosen.rotary(q, k, cos, sin, positions, interleaved)
