"""What all ranks agree on before a step touches anything: is every gradient finite, how large, which parameters move.

In: this rank's gradients. Out: a `Verdict`, the same on every rank. Next: `base` goes on with the step, or nobody does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale
from torch import Tensor
from zero_core import Wire

from ..errors import CompressStateError


@dataclass(frozen=True)
class Verdict:
    """About one step's gradients.

    Attributes:
        finite: no rank has an infinity or NaN.
        mean_square: the mean over ranks of the squared 2-norm of what each holds.
        used: the parameters that some rank has a gradient of, by index; None: all.
        scaled: some rank's gradients are still to be multiplied by a factor of its own.
    """

    finite: bool
    mean_square: float
    used: frozenset[int] | None
    scaled: bool = False


def agree(
    wire: Wire,
    grads: Sequence[Tensor | None],
    scale: float,
    *,
    overflow: bool = False,
    touched: Collection[int] = (),
) -> Verdict:
    """Ask all ranks; each must call it.

    Args:
        wire: the ranks.
        grads: this rank's gradients, by the parameters' indices.
        scale: what they are to be multiplied by.
        overflow: this rank knows of an overflow already.
        touched: parameters that count as used for an earlier gradient's sake.

    Sends 32 bytes to each rank, and a byte a parameter more where a rank lacks gradients.
    """
    local = judge(wire.device, grads, scale, overflow=overflow)
    missing = local.used is not None
    told = torch.tensor(
        [float(not local.finite), float(missing), local.mean_square, float(scale != 1.0)],
        dtype=torch.float64,
        device=wire.device,
    )
    wire.all_reduce("verdict on gradients", told, dist.ReduceOp.SUM).wait()
    bad, lacking, square, scaled = told.tolist()
    used = None
    if lacking:
        mine = [grad is not None or index in touched for index, grad in enumerate(grads)]
        flags = torch.tensor(mine, dtype=torch.uint8, device=wire.device)
        wire.all_reduce("agreement on used parameters", flags, dist.ReduceOp.MAX).wait()
        found = flags.tolist()
        used = None if all(found) else frozenset(i for i, flag in enumerate(found) if flag)
    return Verdict(bad == 0, square / wire.group.size(), used, scaled > 0)


def judge(
    device: torch.device, grads: Sequence[Tensor | None], scale: float, *, overflow: bool = False
) -> Verdict:
    """This rank's own verdict, without a word to others.

    Raises:
        CompressStateError: a sparse gradient.
    """
    given = [grad.detach() for grad in grads if grad is not None]
    if any(grad.layout is not torch.strided for grad in given):
        raise CompressStateError(
            "a sparse gradient: buckets are dense; build the embedding with sparse=False"
        )
    sums = grad_norm_scale(
        [grad.reshape(-1) for grad in given], out=torch.zeros(2, dtype=torch.float64, device=device)
    )
    square, bad = sums.tolist()
    finite = bad == 0 and not overflow and math.isfinite(square)
    used = frozenset(i for i, grad in enumerate(grads) if grad is not None)
    return Verdict(finite, square * scale**2 if finite else 0.0, None if len(used) == len(grads) else used)


def check_alike(wire: Wire, params: Sequence[Tensor]) -> None:
    """Refuse parameters that differ between ranks: steps would keep them apart for ever.

    Raises:
        CompressStateError: they do.
    """
    if wire.group.size() == 1:
        return
    flats = [param.detach().reshape(-1) for param in params]
    # The kernel's sum has the same bits whatever the machine, so that equal values are exactly equal here.
    square = grad_norm_scale(flats, out=torch.zeros(2, dtype=torch.float64, device=wire.device))[:1]
    least, most = square.clone(), square.clone()
    wire.all_reduce("least sum of squared parameters", least, dist.ReduceOp.MIN).wait()
    wire.all_reduce("largest sum of squared parameters", most, dist.ReduceOp.MAX).wait()
    if float(least) < float(most):
        raise CompressStateError(
            "expected the same parameters on every rank before the first step, got sums of squares from "
            f"{float(least):.12g} to {float(most):.12g} (rank {wire.group.rank()}: {float(square):.12g}); "
            "seed alike, load the same values, or wrap the model in DistributedDataParallel, which broadcasts them"
        )
