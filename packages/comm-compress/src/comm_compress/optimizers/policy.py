"""How an optimizer of this package compresses and sends; for all of them alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import CompressConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What shares a scale, and how bytes travel.

    Args:
        bucket_bytes: parameters are reduced together up to so many bytes of fp32. Each rank's part of a bucket is what
            shares one scale, so this is part of the method, like the number of ranks: another size trains otherwise.
        scale_layers: bring the momenta of a bucket's parameters to one size before they share a scale, by factors that
            are frozen with the variance (1-bit LAMB, arXiv:2104.06069, on fused momenta).
        variance_floor: the least root of a frozen variance, as a part of the root mean square of its parameter: a bit's
            worth of momentum over a root near zero would be a leap. A variance of exactly 0 (no gradient yet) takes
            that root mean square itself. 0: nothing but that, as in the papers.
        reduce_dtype: of gradients on the wire where they travel as they are, and of their means; None: their own, or
            fp32 for fp16 gradients under a `GradScaler`. A wider one than theirs takes its size a parameter while a
            step lasts.
        timeout_s: seconds after which a rank that does not come is an error (on the CPU; elsewhere the back end's
            watchdog decides).

    Raises:
        CompressConfigError: out of range.
    """

    bucket_bytes: int = 16 << 20
    scale_layers: bool = False
    variance_floor: float = 1e-3
    reduce_dtype: torch.dtype | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        checks = {
            "bucket_bytes: a number of bytes >= 4": isinstance(self.bucket_bytes, int)
            and not isinstance(self.bucket_bytes, bool)
            and self.bucket_bytes >= 4,
            "0 <= variance_floor <= 1": 0 <= self.variance_floor <= 1,
            "reduce_dtype: float32, bfloat16, float16 or None": self.reduce_dtype in (None, *FLOATS),
            "timeout_s: seconds > 0": 0 < self.timeout_s < math.inf,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise CompressConfigError(f"Compression: expected {' and '.join(broken)}, got {self}")
