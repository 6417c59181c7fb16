"""Factors that bring the momenta of a bucket's parameters to one size, so that one scale serves them all.

In: momenta at the freeze. Out: a factor a parameter, frozen. Source: Li et al., 1-bit LAMB, arXiv:2104.06069, on fused
momenta.
"""

from __future__ import annotations

import math

from accel_kernels import grad_norm_scale

from .bucket import Bucket


def layer_scales(bucket: Bucket, *, enabled: bool) -> list[float]:
    """By position: the mean over parameters of the root mean square of momenta, over that of the parameter.

    1 where a momentum is zero, and everywhere if not `enabled`.
    """
    if not enabled:
        return [1.0] * len(bucket.params)
    sizes = []
    for slot in bucket.plan.slots:
        square = float(grad_norm_scale(bucket.flat["exp_avg"][slot.start : slot.stop])[0])
        sizes.append(math.sqrt(square / slot.numel))
    known = [size for size in sizes if size > 0]
    middle = sum(known) / len(known) if known else 1.0
    return [middle / size if size > 0 else 1.0 for size in sizes]
