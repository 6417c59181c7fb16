"""The global gradient norm over all shards, and the factor that clips it.

In: gradient shards. Out: one scalar that all ranks share; each element is counted once, tied parameters too, since
they have one slot. Next: `optimizer` folds the factor into its step, so that clipping costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accel_kernels import grad_norm_scale

from .collectives import Wire


def global_norm(shards: Sequence[torch.Tensor], wire: Wire, *, replicated: bool) -> torch.Tensor:
    """The 2-norm of gradients that are spread over the ranks; every rank calls it.

    Args:
        shards: this rank's parts, flat, of any floating dtype.
        wire: the ranks.
        replicated: every rank holds all of them (stage 0), so nothing is added up.

    Returns:
        float64 scalar tensor, equal on all ranks; nan if any gradient is not finite.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=wire.device)
    narrow = [shard for shard in shards if shard.dtype != torch.float64]
    if narrow:
        grad_norm_scale(narrow, out=sums)
    for shard in shards:
        if shard.dtype == torch.float64:
            sums += torch.stack([shard.square().sum(), (~shard.isfinite()).sum()])
    if not replicated:
        wire.all_reduce("gradient norm", sums, dist.ReduceOp.SUM).wait()
    return torch.where(sums[1] > 0, torch.full_like(sums[0], torch.nan), sums[0].sqrt())


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """min(1, max_norm / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
