"""RMSNorm, with the addition to the residual stream that comes before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks_inference import FLOATS, SINGLE, expect, expect_written
from ..dispatch import choose_inference

_OP = "rms_norm"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y / sqrt(mean(y^2) + eps) * (weight + weight_offset)`` over the last dimension, in fp32, rounded once.

    ``y`` is ``x``, or, with a residual, the sum of both as rounded to x's dtype, which is then also written to
    ``residual``: one pass for what a block does between two layers. A row's bits depend on that row alone.

    Args:
        x: ``[..., D]`` of up to three dimensions, fp32, bf16 or fp16; rows may lie apart.
        weight: ``[D]``, of x's dtype or fp32.
        eps: added to the mean square.
        residual: of x's shape and dtype; updated in place.
        weight_offset: 1.0 for models that hold the weight as a difference from one (Gemma).
        out: of x's shape and dtype; may be ``x``; None makes a contiguous one.
        backend: as in ``adam_step``.

    Returns:
        ``out``. Gradients are not recorded.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: shapes, devices, layout.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Zhang & Sennrich, arXiv:1910.07467, equation 4.
    """
    expect(_OP, "x", x, FLOATS, (None,) * min(max(x.dim(), 1), 3) if isinstance(x, Tensor) else ())
    expect(_OP, "weight", weight, (x.dtype, *SINGLE), (x.shape[-1],), x.device)
    if residual is not None:
        expect(_OP, "residual", residual, (x.dtype,), x.shape, x.device)
        expect_written(_OP, "residual", residual)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        expect(_OP, "out", out, (x.dtype,), x.shape, x.device)
        expect_written(_OP, "out", out)
    chosen = choose_inference(_OP, x.device.type, x.dtype, backend)
    if x.numel():
        chosen.rms_norm(x, weight, float(eps), residual, float(weight_offset), out)
    return out
