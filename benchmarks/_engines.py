"""Every way to train that `train_step.py` compares: one function each, from a plain model to a step.

An engine's function takes the model as built, on this rank, in float32, and the `Job`, and returns `Step`: the
micro-batches of a step in, this rank's mean loss out, parameters updated. All of them run AdamW with the same
hyper-parameters and clip the global norm at 1.0. Peers are set up as their own documentation advises for the job: they
send gradients once a step, and recompute by torch's `checkpoint_wrapper`. Imports are put off, for no environment has
all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, Attention, Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

Batch = tuple[Tensor, Tensor]
Step = Callable[[Sequence[Batch]], float]


@dataclass(frozen=True)
class Job:
    """What an engine is asked to do.

    Attributes:
        dtype: of the maths.
        sequences: of a micro-batch, a rank.
        accumulate: micro-batches a step.
        recompute: keep only the inputs of blocks for the backward.
    """

    dtype: torch.dtype
    sequences: int
    accumulate: int = 1
    recompute: bool = False


Build = Callable[[GPT, Job], Step]

ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0
# DeepSpeed's default of 5e8 elements would be most of its memory; about DDP's 25 MiB, in float32.
DEEPSPEED_BUCKET = 6_500_000


def init_process_group() -> None:
    """Join this engine's ranks, as the environment says; DeepSpeed wants to do it itself."""
    dist.init_process_group("gloo")


def init_deepspeed() -> None:
    """Join this engine's ranks by DeepSpeed's own function, which also loads its communication operator."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def torch_adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """The fastest AdamW that torch has."""
    return torch.optim.AdamW(parameters, fused=True, **ADAMW)


def ddp(model: GPT, job: Job) -> Step:
    """DistributedDataParallel. In bfloat16, everything is: parameters, gradients and optimizer state."""
    wrapped = _wrap_ddp(model.to(job.dtype), job)
    return _plain_step(wrapped, torch_adamw(wrapped.parameters()), wrapped.no_sync)


def ddp_autocast(model: GPT, job: Job) -> Step:
    """DistributedDataParallel over float32 parameters, maths in bfloat16 under autocast."""
    wrapped = _wrap_ddp(model, job)
    return _plain_step(wrapped, torch_adamw(wrapped.parameters()), wrapped.no_sync, autocast=True)


def ddp_zero_redundancy(model: GPT, job: Job) -> Step:
    """DistributedDataParallel with torch's ZeroRedundancyOptimizer: optimizer state is sharded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = _wrap_ddp(model.to(job.dtype), job)
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=True,
        fused=True,
        **ADAMW,
    )
    return _plain_step(wrapped, optimizer, wrapped.no_sync)


def fsdp2(model: GPT, job: Job) -> Step:
    """FSDP2: `fully_shard` on each block and the root; float32 shards, gathered and reduced in the job's dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if job.recompute:
        _recompute(model)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy()
    if job.dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=job.dtype, reduce_dtype=job.dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = fully_shard(model, mesh=mesh, mp_policy=policy)

    @contextmanager
    def quiet() -> Iterator[None]:
        root.set_requires_gradient_sync(False)
        yield
        root.set_requires_gradient_sync(True)

    return _plain_step(model, torch_adamw(model.parameters()), quiet)


def deepspeed_stage(model: GPT, job: Job, *, stage: int, offload: str | None = None) -> Step:
    """DeepSpeed with its own fused AdamW; bfloat16 keeps a float32 master copy.

    Offload: states (stage 3: parameters, too) to "cpu" or "nvme", as its documentation sets it up.
    """
    import deepspeed

    if job.recompute:
        _recompute(model)
    zero: dict[str, Any] = {}
    if offload is not None:
        place = {"device": offload, "pin_memory": False}
        if offload == "nvme":
            place |= {"nvme_path": os.environ["OFFLOAD_FOLDER"], "buffer_count": 5, "buffer_size": 30_000_000}
        zero["offload_optimizer"] = {k: v for k, v in place.items() if k != "buffer_size"}
        if stage == 3:
            zero["offload_param"] = place
    config = {
        "train_micro_batch_size_per_gpu": job.sequences,
        "gradient_accumulation_steps": job.accumulate,
        "gradient_clipping": MAX_NORM,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "bf16": {"enabled": job.dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": DEEPSPEED_BUCKET,
            "allgather_bucket_size": DEEPSPEED_BUCKET,
            **zero,
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 32, "thread_count": 4},
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(batches: Sequence[Batch]) -> float:
        losses = []
        for tokens, targets in batches:
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    return step


def zero_stage(model: GPT, job: Job, *, stage: int, shared_memory: bool = True, slow: bool = False) -> Step:
    """zero-core; bfloat16 keeps a float32 master copy.

    With `slow` as one would set it where a network is: two blocks are on their way at once; at stages 1 and 2 updated
    parameters are published beside the next forward, and the halves of blocks are units, so that less is reduced last
    and gathered first, when no compute stands beside it.
    """
    import zero_core as zero

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    precision = zero.Precision() if job.dtype == torch.float32 else zero.Precision(compute=job.dtype)
    collectives = None if shared_memory else partial(zero.PlainCollectives, shared_memory=False)
    overlap, units = zero.Overlap(), None
    if slow:
        block = max(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, Block))
        two_bytes = int(2.1 * block * job.dtype.itemsize)  # with the padding of units
        overlap = zero.Overlap(
            publish_late=stage in (1, 2),
            prefetch_bytes=two_bytes if stage == 3 else None,
            reduce_bytes=two_bytes,
        )
        units = (Attention, nn.Sequential) if stage < 3 else None
    sharded = zero.shard(
        model, mesh, stage=stage, precision=precision, collectives=collectives, overlap=overlap, units=units
    )
    if job.recompute:
        zero.checkpoint_modules(sharded, Block, zero.CheckpointPolicy())
    optimizer = zero.ShardedOptimizer(sharded, torch_adamw(sharded.parameters()))
    return _zero_step(sharded, optimizer)


def zero_offload(model: GPT, job: Job, *, stage: int, drive: bool) -> Step:
    """zero-core with everything that the stage shards in a store, stepped there."""
    import zero_core as zero
    import zero_offload_nvme as off

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    precision = zero.Precision() if job.dtype == torch.float32 else zero.Precision(compute=job.dtype)
    store = off.NvmeStore(os.environ["OFFLOAD_FOLDER"]) if drive else off.HostStore()
    sharded = zero.shard(model, mesh, stage=stage, precision=precision, store=store)
    if job.recompute:
        zero.checkpoint_modules(sharded, Block, zero.CheckpointPolicy())
    optimizer = off.OffloadedOptimizer(sharded, torch_adamw(sharded.parameters()))
    return _zero_step(sharded, optimizer)


def _zero_step(model: GPT, optimizer: Any) -> Step:
    """The ordinary loop with zero-core's clipping and accumulation."""
    import zero_core as zero

    accumulate = _accumulation(model, partial(zero.no_sync, model))

    def step(batches: Sequence[Batch]) -> float:
        loss = accumulate(batches)
        zero.clip_grad_norm(optimizer, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _wrap_ddp(model: nn.Module, job: Job) -> nn.parallel.DistributedDataParallel:
    if job.recompute:
        _recompute(model)
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def _recompute(model: nn.Module) -> None:
    """Torch's own activation checkpointing around each block."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def _accumulation(
    model: nn.Module, quiet: Callable[[], AbstractContextManager[None]], *, autocast: bool = False
) -> Step:
    """Forwards and backwards of a step; all but the last under `quiet`, which sends no gradients."""

    def accumulate(batches: Sequence[Batch]) -> float:
        losses = []
        for position, (tokens, targets) in enumerate(batches, 1):
            with nullcontext() if position == len(batches) else quiet():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = model(tokens, targets)
                (loss if len(batches) == 1 else loss / len(batches)).backward()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    return accumulate


def _plain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    quiet: Callable[[], AbstractContextManager[None]],
    *,
    autocast: bool = False,
) -> Step:
    """The ordinary loop, on a model that reduces its own gradients."""
    accumulate = _accumulation(model, quiet, autocast=autocast)

    def step(batches: Sequence[Batch]) -> float:
        loss = accumulate(batches)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def settle(model: GPT) -> None:
    """Wait for parameters that zero-core has left on their way to this rank; others leave none."""
    zero = sys.modules.get("zero_core")
    if zero is None:
        return
    try:
        units = zero.sharded(model).units
    except zero.ZeroStateError:  # what comm-compress imports it for shards nothing
        return
    for unit in units:
        unit.settle()


ENGINES: dict[str, Build] = {
    "ddp": ddp,
    "ddp-autocast": ddp_autocast,
    "ddp+zero-redundancy": ddp_zero_redundancy,
    "fsdp2": fsdp2,
    **{f"deepspeed-{stage}": partial(deepspeed_stage, stage=stage) for stage in (1, 2, 3)},
    **{
        f"deepspeed-{stage}-{place}": partial(deepspeed_stage, stage=stage, offload=device)
        for stage in (2, 3)
        for place, device in (("host", "cpu"), ("drive", "nvme"))
    },
    **{
        f"zero-core-{stage}-{place}": partial(zero_offload, stage=stage, drive=place == "drive")
        for stage in (1, 2, 3)
        for place in ("host", "drive")
    },
    **{f"zero-core-{stage}": partial(zero_stage, stage=stage) for stage in (0, 1, 2, 3)},
    **{
        f"zero-core-{stage}-messages": partial(zero_stage, stage=stage, shared_memory=False)
        for stage in (1, 2, 3)
    },
    **{
        f"zero-core-{stage}-network": partial(zero_stage, stage=stage, shared_memory=False, slow=True)
        for stage in (1, 2, 3)
    },
}
