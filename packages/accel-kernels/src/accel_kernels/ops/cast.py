"""Scaled copy between floating-point formats."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..dispatch import choose
from ..errors import AccelTypeError, AccelValueError
from .common import mark_written


def cast_copy(
    src: Tensor,
    dst: Tensor,
    *,
    scale: float = 1.0,
    stochastic: bool = False,
    seed: int | None = None,
    backend: str | None = None,
) -> None:
    """``dst = round(src * scale)``, between any two of fp32, bf16 and fp16.

    The product is formed in fp32 and rounded once: to nearest even, or stochastically - up with a probability
    equal to the part cut off, which is right on average. The random bits depend on ``(seed, index)`` alone:
    the same result on every back end, whatever the number of threads. Into fp32 nothing is cut off, and
    ``stochastic`` changes nothing. Values beyond the largest finite one are rounded to nearest, NaN stays
    NaN.

    Args:
        src: fp32, bf16 or fp16, flat, contiguous, n elements; read.
        dst: likewise; written. Must not share memory with ``src``.
        scale: multiplies every element, in fp32.
        stochastic: round stochastically.
        seed: needed if ``stochastic``; any integer, taken modulo 2^64.
        backend: as in ``adam_step``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap, or no seed.
        BackendUnavailableError: ``backend`` cannot run here.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551, section 3;
    random bits by
    SplitMix64 (Steele, Lea & Flood, OOPSLA 2014, figure 14).
    """
    op = "cast_copy"
    checks.check_flat(op, [("src", src, checks.FLOATS, False), ("dst", dst, checks.FLOATS, True)])
    if not isinstance(scale, (float, int)):
        raise AccelTypeError(f"{op}: scale: expected a number, got {type(scale).__name__}")
    if stochastic and not isinstance(seed, int):
        raise AccelValueError(f"{op}: seed: expected an integer for stochastic rounding, got {seed!r}")
    chosen = choose(op, src.device, backend)
    if src.numel() > 0:
        chosen.cast(src, dst, float(scale), stochastic, seed or 0)
    mark_written(dst)
