"""The parity matrix: after five steps, parameters equal plain DDP's, whatever stage, knob or pattern of use."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded

STEPS = 5
KNOBS = list(itertools.product((1, 4), (1, 1 << 30), (True, False), (1, 2), (False, True)))


def backward(model: nn.Module, ids: torch.Tensor, weight: float, num_backwards: int) -> None:
    if num_backwards == 1:
        (loss_of(model, ids) * weight).backward()
    else:  # two losses, two graphs: the second uses only half of the batch
        (loss_of(model, ids) * weight * 0.5).backward()
        (loss_of(model, ids[:1]) * weight * 0.5).backward()


def train(model, optimizer, clip, rank, accumulate, num_backwards, no_sync=None) -> None:
    ids = iter(batches(rank, STEPS * accumulate))
    for _ in range(STEPS):
        for micro in range(accumulate):
            quiet = no_sync is not None and micro < accumulate - 1
            with no_sync() if quiet else nullcontext():
                backward(model, next(ids), 1 / accumulate, num_backwards)
        clip()
        optimizer.step()
        optimizer.zero_grad()


def freeze_some(model: nn.Module) -> None:
    model.blocks[0].up.weight.requires_grad_(False)
    for param in model.blocks[1].parameters():
        param.requires_grad_(False)


def build_optimizer(params, dtype) -> torch.optim.Optimizer:
    trainable = [p for p in params if p.requires_grad]
    if dtype == torch.float32:
        return torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1)
    # Squares of gradients underflow in fp16: Adam would compare noise with noise.
    return torch.optim.SGD(trainable, lr=0.05, momentum=0.9)


def compare(rank, world_size, stage, dtype, knobs, use_no_sync):
    """Worst relative error of each combination of knobs."""
    mesh = dp_mesh(world_size)
    worst, references = {}, {}
    for knob in knobs:
        accumulate, bucket, overlap, num_backwards, frozen = knob
        start = seeded(lambda: Net(unused=True))
        if frozen:
            freeze_some(start)
        key = (accumulate, num_backwards, frozen)
        if key not in references:
            ddp = DistributedDataParallel(plain_copy(start).to(dtype), find_unused_parameters=True)
            inner = build_optimizer(ddp.parameters(), dtype)
            clip = lambda ddp=ddp: torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.5)  # noqa: E731
            train(ddp, inner, clip, rank, accumulate, num_backwards)
            references[key] = {n: v.clone() for n, v in ddp.module.state_dict().items()}
        precision = zero.Precision(compute=dtype, master=dtype)
        limits = {"reduce_bytes": bucket} | ({"prefetch_bytes": bucket} if stage == 3 else {})
        knob_policy = zero.Overlap(**limits) if overlap else zero.Overlap(enabled=False)
        model = zero.shard(start, mesh, stage=stage, precision=precision, overlap=knob_policy)
        opt = zero.ShardedOptimizer(model, build_optimizer(model.parameters(), dtype))
        no_sync = (lambda model=model: zero.no_sync(model)) if use_no_sync else None
        train(
            model,
            opt,
            lambda opt=opt: zero.clip_grad_norm(opt, 0.5),
            rank,
            accumulate,
            num_backwards,
            no_sync,
        )
        found = zero.full_state_dict(model)
        moved = relative_error(
            found, {n: v.to(dtype) for n, v in seeded(lambda: Net(unused=True)).state_dict().items()}
        )
        assert moved > 1e-3, "the steps changed nothing: the comparison would be empty"
        worst[knob] = relative_error(found, references[key])
    return worst


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "world_size"),
    [
        (0, 2),
        (1, 3),
        (2, 2),
        (3, 2),
        (3, 3),
        *(pytest.param(stage, world, marks=SLOW) for stage, world in ((0, 3), (1, 2), (2, 3))),
    ],
)
def test_fp32_equals_ddp(stage: int, world_size: int) -> None:
    for worst in run_ranks(
        compare, world_size, world_size, stage, torch.float32, KNOBS, False, timeout_s=280
    ):
        bad = {knob: error for knob, error in worst.items() if not error <= 1e-6}
        assert not bad
        assert len(worst) == len(KNOBS)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_no_sync_equals_ddp(stage: int) -> None:
    knobs = [knob for knob in KNOBS if knob[0] == 4 and knob[2]]
    for worst in run_ranks(compare, 2, 2, stage, torch.float32, knobs, True, timeout_s=180):
        assert max(worst.values()) <= 1e-6, worst


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_low_precision_equals_ddp_within_its_rounding(stage: int, dtype: torch.dtype) -> None:
    knobs = [(1, 1 << 30, True, 1, False), (4, 1, True, 1, True), (4, 1 << 30, False, 2, False)]
    for worst in run_ranks(compare, 2, 2, stage, dtype, knobs, False, timeout_s=180):
        # Five steps, each rounding every parameter once to the dtype's mantissa.
        assert max(worst.values()) <= STEPS * torch.finfo(dtype).eps, worst
