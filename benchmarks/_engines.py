"""Every way to train that `train_step.py` compares: one function each, from a plain model to a step.

An engine's function takes the model as built, on this rank, in float32, and returns `Step`: batch in, this
rank's loss out, parameters updated. All of them run AdamW with the same hyper-parameters and clip the global norm
at 1.0. Peers are set up as their own documentation advises for the job; imports are put off, for no environment
has all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

Step = Callable[[Tensor, Tensor], float]
Build = Callable[[GPT, torch.dtype], Step]

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


def ddp(model: GPT, dtype: torch.dtype) -> Step:
    """DistributedDataParallel. In bfloat16, everything is: parameters, gradients and optimizer state."""
    wrapped = _wrap_ddp(model.to(dtype))
    return _plain_step(wrapped, torch_adamw(wrapped.parameters()))


def ddp_autocast(model: GPT, dtype: torch.dtype) -> Step:
    """DistributedDataParallel over float32 parameters, maths in `dtype` under autocast."""
    wrapped = _wrap_ddp(model)
    return _plain_step(wrapped, torch_adamw(wrapped.parameters()), autocast=dtype)


def ddp_zero_redundancy(model: GPT, dtype: torch.dtype) -> Step:
    """DistributedDataParallel with torch's ZeroRedundancyOptimizer: optimizer state is sharded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = _wrap_ddp(model.to(dtype))
    optimizer = ZeroRedundancyOptimizer(
        wrapped.parameters(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=True,
        fused=True,
        **ADAMW,
    )
    return _plain_step(wrapped, optimizer)


def fsdp2(model: GPT, dtype: torch.dtype) -> Step:
    """FSDP2: `fully_shard` on each block and the root; float32 shards, gathered and reduced in `dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return _plain_step(model, torch_adamw(model.parameters()))


def deepspeed_stage(model: GPT, dtype: torch.dtype, *, stage: int) -> Step:
    """DeepSpeed with its own fused AdamW; bfloat16 keeps a float32 master copy."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": int(os.environ["SEQUENCES"]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_NORM,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"])}},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": DEEPSPEED_BUCKET,
            "allgather_bucket_size": DEEPSPEED_BUCKET,
        },
        "steps_per_print": 1 << 30,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def zero_stage(model: GPT, dtype: torch.dtype, *, stage: int, shared_memory: bool = True) -> Step:
    """zero-core; bfloat16 keeps a float32 master copy."""
    import zero_core as zero

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    precision = zero.Precision(compute=dtype) if dtype != torch.float32 else zero.Precision()
    collectives = None if shared_memory else partial(zero.PlainCollectives, shared_memory=False)
    sharded = zero.shard(model, mesh, stage=stage, precision=precision, collectives=collectives)
    optimizer = zero.ShardedOptimizer(sharded, torch_adamw(sharded.parameters()))

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss = sharded(tokens, targets)
        loss.backward()
        zero.clip_grad_norm(optimizer, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def _wrap_ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def _plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, autocast: torch.dtype = torch.float32
) -> Step:
    """The ordinary loop, on a model that reduces its own gradients."""

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast == torch.bfloat16):
            loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


ENGINES: dict[str, Build] = {
    "ddp": ddp,
    "ddp-autocast": ddp_autocast,
    "ddp+zero-redundancy": ddp_zero_redundancy,
    "fsdp2": fsdp2,
    **{f"deepspeed-{stage}": partial(deepspeed_stage, stage=stage) for stage in (1, 2, 3)},
    **{f"zero-core-{stage}": partial(zero_stage, stage=stage) for stage in (0, 1, 2, 3)},
    **{
        f"zero-core-{stage}-messages": partial(zero_stage, stage=stage, shared_memory=False)
        for stage in (1, 3)
    },
}
