"""0/1 Adam between synchronizations: what a rank has drifted from the values that all have in common.

In: this rank's momenta, step by step. Out: its own values, and after a synchronization everybody's. With d the divisor
and x what all have in common, a rank that has drifted by u shows x (all weight decay since) - u / d. Next:
`zero_one_adam` says when.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CompressStateError
from .bucket import Bucket
from .moves import decay, rate
from .rules import Group

NUMBERS: Mapping[str, float] = {
    "mass": 0.0,  # sum of rates since the last synchronization, each with the weight decay after it
    "decay": 1.0,  # all weight decay since then
    "alone": 0,  # steps since then that a rank moved it alone
}
"""What is kept of each parameter meanwhile, and what it is at first."""


def drift_on(bucket: Bucket, groups: Sequence[Group], used: Collection[int] | None, drift: Tensor) -> None:
    """One more step by this rank's momentum, of what moves; `drift` is [bucket], fp32, in place."""
    masses, decays = bucket.numbers["mass"], bucket.numbers["decay"]
    for run in bucket.runs(used):
        group, cut = groups[run.group], slice(run.start, run.stop)
        kept, step_rate = decay(group), rate(group, run.step)
        drift[cut].mul_(kept).add_(bucket.flat["exp_avg"][cut], alpha=step_rate)
        for slot in run.slots:
            masses[slot.position] = masses[slot.position] * kept + step_rate
            decays[slot.position] *= kept


def land(bucket: Bucket, mean: Tensor, used: Collection[int] | None, scratch: Tensor) -> list[Tensor]:
    """The mean drift has come: into the values that all have in common, and into momenta, of what moves.

    Returns:
        The momenta of which that says nothing, since nothing moves at a rate of 0: they are still this rank's own.
    """
    still: list[Tensor] = []
    torch.div(mean, bucket.flat["denominator"], out=scratch)
    for slot in bucket.moving(used):
        cut, mass = slice(slot.start, slot.stop), bucket.numbers["mass"][slot.position]
        momentum = bucket.flat["exp_avg"][cut]
        if mass == 0:
            still.append(momentum)
            continue
        torch.div(mean[cut], mass, out=momentum)
        param = bucket.params[slot.position]
        values = param if bucket.master is None else bucket.view(bucket.master, slot)
        values.mul_(bucket.numbers["decay"][slot.position]).sub_(bucket.view(scratch, slot))
    return still


def forget(bucket: Bucket) -> None:
    """Nothing has drifted any more."""
    for key, first in NUMBERS.items():
        bucket.numbers[key] = [first] * len(bucket.params)
    if "drift" in bucket.flat:
        bucket.flat["drift"].zero_()


def own_values(bucket: Bucket, out: Tensor) -> Tensor:
    """What this rank shows: [bucket], fp32, in `out`."""
    assert bucket.master is not None
    torch.div(bucket.flat["drift"], bucket.flat["denominator"], out=out).neg_()
    for slot in bucket.plan.slots:
        cut = slice(slot.start, slot.stop)
        out[cut].add_(bucket.master[cut], alpha=bucket.numbers["decay"][slot.position])
    return out


def refuse_edits(bucket: Bucket, shown: Tensor) -> None:
    """Others may have written to parameters, but only what they showed already (a model loaded after its optimizer).

    Args:
        bucket: whose.
        shown: `own_values`.

    Raises:
        CompressStateError: something else was written: ranks would stay apart by it.
    """
    for slot in bucket.edits():
        param = bucket.params[slot.position]
        if not torch.equal(bucket.view(shown, slot).to(param.dtype), param):
            raise CompressStateError(
                f"parameter '{slot.name}' was written while each rank had values of its own, so that it is not known "
                "what all have in common; call synchronize() before"
            )
