"""Ways to train that send less, as `_engines` has the others: for `compression.py`.

All of them send messages, though two hosts of one machine could share memory. The 1-bit optimizers are measured in
their compressed phase, which begins after two steps; each of the two hosts is a node of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from _engines import ADAMW, ENGINES, MAX_NORM, Batch, Build, Job, Step, _accumulation, _zero_step, torch_adamw
from gpt import GPT, Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

FREEZE_STEP = 2
LOCAL_STEPS = 8
"""Of `0-1-adam-local` from one message to the next, from its fifth step on."""


def one_bit(model: GPT, job: Job, *, kind: str, **more: Any) -> Step:
    """An optimizer of comm-compress in the ordinary loop: gradients stay here, momenta travel as signs."""
    import comm_compress as cc

    group = dist.group.WORLD
    model = model.to(job.dtype)
    freeze: dict[str, Any] = {
        "OneBitAdam": {"freeze_step": FREEZE_STEP},
        "OneBitLamb": {"freeze_step": FREEZE_STEP},
        "ZeroOneAdam": {"var_freeze_step": FREEZE_STEP},
    }[kind]
    compression = cc.Compression(timeout_s=300.0)
    optimizer = getattr(cc, kind)(
        model.parameters(), **ADAMW, **freeze, **more, group=group, compression=compression
    )

    def step(batches: Sequence[Batch]) -> float:
        losses = []
        for tokens, targets in batches:
            loss = model(tokens, targets)
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        optimizer.clip_grad_norm(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).mean())

    return step


def zero_pp(model: GPT, job: Job, *, stage: int = 3, **settings: Any) -> Step:
    """zero-core with quantized weights, quantized gradients and weights kept between forward and backward."""
    import comm_compress as cc
    import zero_core as zero

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    precision = zero.Precision() if job.dtype == torch.float32 else zero.Precision(compute=job.dtype)
    block = max(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block))
    two_bytes = int(2.1 * block * job.dtype.itemsize)
    collectives = cc.QuantizedCollectives(
        node_size=1, secondary=stage == 3, shared_memory=False, timeout_s=300.0, **settings
    )
    sharded = zero.shard(
        model,
        mesh,
        stage=stage,
        precision=precision,
        collectives=collectives,
        overlap=zero.Overlap(
            publish_late=stage in (1, 2),
            prefetch_bytes=two_bytes if stage == 3 else None,
            reduce_bytes=two_bytes,
            timeout_s=300.0,
        ),
    )
    return _zero_step(sharded, zero.ShardedOptimizer(sharded, torch_adamw(sharded.parameters())))


def ddp_hook(model: GPT, job: Job, *, kind: Any) -> Step:
    """DistributedDataParallel with one of comm-compress's hooks, and buckets of 4 MiB: codecs take time too."""
    import comm_compress as cc

    wrapped = nn.parallel.DistributedDataParallel(
        model.to(job.dtype), gradient_as_bucket_view=True, bucket_cap_mb=4
    )
    by_messages = None if kind == "1bit" else False  # whose signs never travel otherwise
    wrapped.register_comm_hook(None, cc.ddp_hook(kind, timeout_s=300.0, shared_memory=by_messages))
    optimizer = torch_adamw(wrapped.parameters())
    accumulate = _accumulation(wrapped, wrapped.no_sync)

    def step(batches: Sequence[Batch]) -> float:
        loss = accumulate(batches)
        nn.utils.clip_grad_norm_(wrapped.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


COMPRESSED: dict[str, Build] = {
    "1-bit-adam": partial(one_bit, kind="OneBitAdam"),
    "1-bit-lamb": partial(one_bit, kind="OneBitLamb"),
    "0-1-adam": partial(one_bit, kind="ZeroOneAdam"),
    "0-1-adam-local": partial(
        one_bit, kind="ZeroOneAdam", local_step_scaler=1, local_step_clipper=LOCAL_STEPS
    ),
    "zero++-3": zero_pp,
    "zero++-3-auto": partial(zero_pp, policy="auto"),
    "zero++-2": partial(zero_pp, stage=2),
    "ddp-int8": partial(ddp_hook, kind="int8"),
    "ddp-int4": partial(ddp_hook, kind="int4"),
    "ddp-1bit": partial(ddp_hook, kind="1bit"),
}
ALL: dict[str, Build] = {**ENGINES, **COMPRESSED}
