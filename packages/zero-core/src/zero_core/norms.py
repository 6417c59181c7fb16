"""The global gradient norm over all shards, and the factor that clips it.

In: gradient shards. Out: one scalar that all ranks share; each element is counted once, tied parameters too, since
they have one slot. Next: `optimizer` folds the factor into its step, so that clipping costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale

from .collectives import Wire

if TYPE_CHECKING:
    from .optimizer import ShardedOptimizer


@dataclass(frozen=True)
class Measured:
    """A gradient that has been looked at.

    Attributes:
        sums: [2], fp64: sum of squares, number of elements that are not finite.
    """

    sums: torch.Tensor

    @staticmethod
    def of(shard: torch.Tensor) -> Measured:
        """Of a flat tensor; one read of it."""
        if shard.dtype != torch.float64:
            return Measured(grad_norm_scale(shard))
        return Measured(torch.stack([shard.square().sum(), (~shard.isfinite()).sum()]))


def global_norm(shards: Sequence[torch.Tensor | Measured], wire: Wire, *, replicated: bool) -> torch.Tensor:
    """The 2-norm of gradients that are spread over the ranks; every rank calls it.

    Args:
        shards: this rank's parts, flat, of any floating dtype; or what is known of them.
        wire: the ranks.
        replicated: every rank holds all of them (stage 0), so nothing is added up.

    Returns:
        float64 scalar tensor, equal on all ranks; nan if any gradient is not finite.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=wire.device)
    for at_once, some in groupby(shards, lambda shard: _at_once(shard, wire.device)):
        if at_once:
            grad_norm_scale(list(some), out=sums)  # type: ignore[arg-type]  # tensors all
        else:
            for shard in some:
                known = shard if isinstance(shard, Measured) else Measured.of(shard)
                sums += known.sums.to(wire.device)
    if not replicated:
        wire.all_reduce("gradient norm", sums, dist.ReduceOp.SUM).wait()
    return torch.where(sums[1] > 0, torch.full_like(sums[0], torch.nan), sums[0].sqrt())


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_grad_norm(optimizer: ShardedOptimizer, max_norm: float) -> torch.Tensor:
    """Clip the gradients of the next step by their global norm over all shards; every rank calls it.

    Costs one read of this rank's gradients and one all-reduce of two numbers; the scaling itself rides on the step.

    Returns:
        float32 scalar tensor: the norm before clipping, equal on all ranks.

    Raises:
        ZeroConfigError: `max_norm` is not positive.
    """
    return optimizer.clip_grad_norm(max_norm)


def grad_norm(optimizer: ShardedOptimizer) -> torch.Tensor:
    """The global norm that `clip_grad_norm` would report, without clipping; every rank calls it."""
    return optimizer.grad_norm()


def _at_once(shard: torch.Tensor | Measured, device: torch.device) -> bool:
    """Whether the kernel can add it up with others."""
    return isinstance(shard, torch.Tensor) and shard.dtype != torch.float64 and shard.device == device
