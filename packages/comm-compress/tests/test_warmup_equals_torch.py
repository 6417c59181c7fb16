"""Warm-up is exact: torch's AdamW and Adam under DistributedDataParallel, and LAMB on mean gradients."""

from __future__ import annotations

from typing import Any

import comm_compress as cc
import pytest
import torch
from optimizer_models import SMALL, Net, loss_of, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks

STEPS = 8


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "lr": 3e-3, "betas": (0.8, 0.99)},
    ]


def beside_ddp(rank: int, decoupled: bool, shard: bool, clip: bool) -> float:
    """The largest relative difference of any parameter at any step."""
    ours, reference = Net(), DistributedDataParallel(Net(), find_unused_parameters=True)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(groups_of(reference.module), lr=1e-2, weight_decay=0.0)
    optimizer = cc.OneBitAdam(
        groups_of(ours), lr=1e-2, freeze_step=100, decoupled_weight_decay=decoupled, shard=shard, compression=SMALL
    )  # fmt: skip
    worst, clipped = 0.0, 0
    for step in range(STEPS):
        loss_of(ours, rank, step).backward()
        loss_of(reference, rank, step).backward()
        if clip:
            norm = optimizer.clip_grad_norm(0.5)
            expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            torch.testing.assert_close(norm, expected.float(), rtol=1e-5, atol=0)
            clipped += int(norm > 0.5)
        optimizer.step()
        theirs.step()
        if not shard and not clip:  # as under data parallelism
            for one, other in zip(ours.parameters(), reference.module.parameters(), strict=True):
                if other.numel():
                    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
        optimizer.zero_grad()
        theirs.zero_grad()
        for one, other in zip(ours.parameters(), reference.module.parameters(), strict=True):
            if one.numel():
                worst = max(worst, float((one - other).detach().abs().max() / other.abs().max()))
    assert clipped > 2 or not clip
    return worst


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shard", [False, True])
def test_adamw(world: int, shard: bool) -> None:
    assert max(run_ranks(beside_ddp, world, True, shard, False)) < 1e-6 * STEPS


def test_adam_with_l2_and_clipping() -> None:
    assert max(run_ranks(beside_ddp, 2, False, False, True)) < 1e-6 * STEPS
    assert max(run_ranks(beside_ddp, 2, True, True, True)) < 1e-6 * STEPS


def lamb(params: list[torch.Tensor], grads: list[torch.Tensor], state: list[Any], step: int) -> None:
    """LAMB (arXiv:1904.00962), plainly; lr 1e-2, betas 0.9 and 0.999, weight decay 0.1, phi(z) = z."""
    for param, grad, moments in zip(params, grads, state, strict=True):
        m, v = moments
        m.mul_(0.9).add_(grad, alpha=0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.1 * param
        values_norm, update_norm = float(param.norm()), float(update.norm())
        ratio = values_norm / update_norm if values_norm > 0 and update_norm > 0 else 1.0
        param.sub_(update, alpha=1e-2 * min(max(ratio, 0.01), 10.0))


def beside_lamb(rank: int, world: int, shard: bool) -> float:
    ours = Net()
    optimizer = cc.OneBitLamb(
        ours.parameters(), lr=1e-2, weight_decay=0.1, freeze_step=100, shard=shard, compression=SMALL
    )
    model = Net()
    trained = [p for p in model.parameters() if p.numel()]
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in trained]
    worst = 0.0
    for step in range(1, STEPS + 1):
        loss_of(ours, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        sums = [torch.zeros_like(p) for p in trained]
        for peer in range(world):
            grads = torch.autograd.grad(loss_of(model, peer, step), trained)
            for total, grad in zip(sums, grads, strict=True):
                total += grad / world
        with torch.no_grad():
            lamb([p.data for p in trained], sums, state, step)
        for name, param in values(model).items():
            if param.numel():
                other = dict(ours.named_parameters())[name]
                worst = max(worst, float((param - other).abs().max() / param.abs().max()))
    return worst


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("world", [1, 3])
def test_lamb(world: int, shard: bool) -> None:
    assert max(run_ranks(beside_lamb, world, world, shard)) < 5e-6 * STEPS


def low_precision(rank: int, dtype: torch.dtype, shard: bool) -> float:
    """Parameters of 16 bits are roundings of fp32 masters that see the same gradients."""
    model, masters = Net(dtype), [p.detach().float().requires_grad_() for p in Net(dtype).parameters()]
    optimizer = cc.OneBitAdam(
        model.parameters(),
        lr=1e-3,
        weight_decay=0.1,
        freeze_step=100,
        shard=shard,
        compression=cc.Compression(bucket_bytes=600, reduce_dtype=torch.float32),
    )
    theirs = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.1)
    for step in range(STEPS):
        loss_of(model, rank, step).backward()
        for param, master in zip(model.parameters(), masters, strict=True):
            if param.grad is not None:
                master.grad = param.grad.float()
                torch.distributed.all_reduce(master.grad)
                master.grad /= torch.distributed.get_world_size()
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
    pairs = [(p.detach(), m.detach().to(dtype)) for p, m in zip(model.parameters(), masters, strict=True)]
    differing = sum(int((one != other).sum()) for one, other in pairs)
    return differing / sum(one.numel() for one, _ in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [False, True])
def test_masters_of_low_precision(dtype: torch.dtype, shard: bool) -> None:
    # A few elements lie next to where the rounding changes.
    assert max(run_ranks(low_precision, 2, dtype, shard)) < 0.02
