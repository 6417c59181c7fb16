"""What a step computes where momenta travel: this rank's gradient into a momentum, and a direction into the values.

In: a `Bucket`, the optimizer's groups, this rank's gradients or what has become of the momenta. Out: flat tensors and
parameters, updated in place. `rules` has the steps of warm-up. Next: the step is done.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .bucket import Bucket
from .rules import Group, corrections


def rate(group: Group, step: int) -> float:
    """The learning rate, with the momentum's bias corrected."""
    return float(group["lr"]) / corrections(group, step)[0]


def decay(group: Group) -> float:
    """What a step multiplies values by: 1 unless weight decay is decoupled."""
    return 1 - float(group["lr"]) * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0


def blend(
    bucket: Bucket,
    groups: Sequence[Group],
    grads: Sequence[Tensor | None],
    scale: float,
    used: Collection[int] | None,
    momentum: Tensor,
    out: Tensor,
) -> None:
    """Out = beta1 momentum + (1 - beta1) (scale gradient + weight decay, unless that is decoupled), of what moves.

    Args:
        bucket: whose.
        groups: the optimizer's.
        grads: this rank's, by the parameters' indices; None counts as zeros.
        scale: see above.
        used: what moves.
        momentum: [bucket], fp32.
        out: [bucket], fp32; may be `momentum`.
    """
    for run in bucket.runs(used):
        group = groups[run.group]
        beta1 = group["betas"][0]
        torch.mul(momentum[run.start : run.stop], beta1, out=out[run.start : run.stop])
        pairs = [(bucket.view(out, slot), grads[slot.index]) for slot in run.slots]
        given = [(view, grad) for view, grad in pairs if grad is not None]
        if given:
            views, own = [view for view, _ in given], [grad for _, grad in given]
            torch._foreach_add_(views, own, alpha=(1 - beta1) * scale)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            # Of fp32 parameters themselves: beside a master they are this rank's own (0/1 Adam between syncs).
            master = None if bucket.dtype == torch.float32 else bucket.master
            values = bucket.params_of(run.slots) if master is None else bucket.views(master, run.slots)
            torch._foreach_add_(
                bucket.views(out, run.slots), values, alpha=(1 - beta1) * group["weight_decay"]
            )


def move(bucket: Bucket, groups: Sequence[Group], direction: Tensor, used: Collection[int] | None) -> None:
    """Values = values `decay` - `rate` direction ([bucket], fp32), of what moves; in masters, and published."""
    for run in bucket.runs(used):
        group = groups[run.group]
        if bucket.master is not None:
            values, directions = [bucket.master[run.start : run.stop]], [direction[run.start : run.stop]]
        else:
            values, directions = bucket.params_of(run.slots), bucket.views(direction, run.slots)
        if decay(group) != 1.0:
            torch._foreach_mul_(values, decay(group))
        torch._foreach_add_(values, directions, alpha=-rate(group, run.step))
    bucket.publish(bucket.moving(used))
