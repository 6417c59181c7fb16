"""Variances: one more squared gradient, and the roots that momenta are divided by.

In: mean gradients, or a variance that is to stay. Out: tensors of a bucket, fp32. Next: `onebit_adam` and `onebit_lamb`
keep the roots for ever, `zero_one_adam` until the next update.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from accel_kernels import grad_norm_scale
from torch import Tensor

from .bucket import Bucket
from .rules import Group, corrections


def add_squares(
    bucket: Bucket,
    groups: Sequence[Group],
    grads: Sequence[Tensor | None],
    scale: float,
    used: Collection[int] | None,
) -> None:
    """V = beta2 v + (1 - beta2) (scale gradient + weight decay, unless that is decoupled)^2, of what moves.

    All of that has a gradient here, and values that are the same on all ranks.
    """
    for slot in bucket.moving(used):
        grad, group = grads[slot.index], groups[slot.group]
        assert grad is not None
        beta2 = group["betas"][1]
        scaled = grad.float() if scale == 1.0 else grad.float().mul_(scale)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            param = bucket.params[slot.position]
            values = param.detach() if bucket.master is None else bucket.view(bucket.master, slot)
            scaled = scaled.add(values, alpha=group["weight_decay"])
        bucket.view(bucket.flat["exp_avg_sq"], slot).mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)


def settle_roots(
    bucket: Bucket,
    variance: Tensor,
    counts: Sequence[float],
    groups: Sequence[Group],
    floor: float,
) -> Tensor:
    """A bucket's variances become their roots, bias-corrected, as they will be divided by: [bucket], fp32, in place.

    A root is at least `floor` times the root mean square of its parameter; one of exactly 0 is that root mean square,
    since it has no size of its own yet. A parameter without any variance takes the bucket's.

    Args:
        bucket: whose.
        variance: [bucket].
        counts: by position: updates of the variance so far.
        groups: the optimizer's.
        floor: see above.

    Returns:
        `variance`.
    """
    roots = variance.sqrt_()
    squares, numel = 0.0, 0
    blank: list[Tensor] = []
    for slot in bucket.plan.slots:
        view = roots[slot.start : slot.stop]
        step = max(1, int(counts[slot.position]))
        view.div_(math.sqrt(corrections(groups[slot.group], step)[1]))
        # The kernel's sum has the same bits on every rank, whatever its threads.
        square = float(grad_norm_scale(view)[0])
        if square == 0:
            blank.append(view)
            continue
        squares, numel = squares + square, numel + slot.numel
        size = math.sqrt(square / slot.numel)
        zero = view == 0
        view.clamp_(min=floor * size).masked_fill_(zero, size)
    for view in blank:
        view.fill_(math.sqrt(squares / numel) if numel else 1.0)
    return roots
