"""On CUDA devices: the same messages as on the processor, and training through them.

Ranks have a device each and NCCL where there are as many devices, else they share one and send by gloo.
"""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from compress_lab import build, simulated_gather, simulated_reduce, train
from steps_lab import flat, make_params, rate, set_gradients
from zero_core.testing import run_ranks

DEVICE = "cuda"
RANKS = 2
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def group_on(device: str) -> dist.ProcessGroup:
    """Of all ranks, for tensors of `device`, which is this rank's default from here on."""
    if device == "cpu":
        return dist.group.WORLD
    alone = torch.cuda.device_count() >= dist.get_world_size()
    torch.cuda.set_device(dist.get_rank() if alone else 0)
    return dist.new_group(backend="nccl" if alone else "gloo")


def collectives(rank: int, device: str, node_size: int) -> None:
    group, grid = group_on(device), Grid(RANKS, node_size)
    generator = torch.Generator().manual_seed(0)
    made = cc.QuantizedCollectives(
        weights="int8", grads="int4", node_size=node_size, secondary=True, min_bytes=0, group=group
    )
    for tag, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        for numel in (1, 257, 5000):
            shards = [torch.randn(numel, generator=generator).to(dtype) for _ in range(RANKS)]
            out = torch.empty(RANKS * numel, dtype=dtype, device=device)
            made.gather_weights(lambda s=shards: s[rank].to(device), out, tag=tag, version=1).wait()
            assert torch.equal(out.cpu(), simulated_gather(shards, BlockFormat(8))), (numel, dtype)
            fulls = [torch.randn(RANKS * numel, generator=generator).to(dtype) for _ in range(RANKS)]
            reduced = torch.empty(numel, dtype=dtype, device=device)
            made.reduce_scatter(fulls[rank].to(device), reduced, tag=tag).wait()
            mean = simulated_reduce(fulls, grid, BlockFormat(4))[rank].to(dtype)
            torch.testing.assert_close(reduced.cpu(), mean, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("node_size", [1, 2])
def test_collectives_equal_the_equations(node_size: int) -> None:
    run_ranks(collectives, RANKS, DEVICE, node_size)


def optimizer_steps(rank: int, device: str, kind: str) -> torch.Tensor:
    params = [torch.nn.Parameter(param.detach().to(device)) for param in make_params()]
    freeze = {"var_freeze_step": 5} if kind == "ZeroOneAdam" else {"freeze_step": 5}
    optimizer = getattr(cc, kind)(params, lr=0.05, group=group_on(device), **freeze)
    for step in range(1, 16):
        for options in optimizer.param_groups:
            options["lr"] = rate(step)
        own = [torch.nn.Parameter(param.detach().cpu()) for param in params]
        set_gradients(own, rank, step)
        for param, other in zip(params, own, strict=True):
            param.grad = other.grad.to(device)
        optimizer.step()
    if kind == "ZeroOneAdam":
        optimizer.synchronize()
    return flat(params).cpu()


@pytest.mark.parametrize("kind", ["OneBitAdam", "ZeroOneAdam", "OneBitLamb"])
def test_optimizers_step_as_on_the_processor(kind: str) -> None:
    found = run_ranks(optimizer_steps, RANKS, DEVICE, kind)
    assert torch.equal(found[0], found[1])
    expected = run_ranks(optimizer_steps, RANKS, "cpu", kind)[0]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def stage_losses(rank: int, device: str, stage: int, options: dict) -> tuple[list[float], float]:
    group = group_on(device)
    made = cc.QuantizedCollectives(min_bytes=0, node_size=1, secondary=stage == 3, **options)
    model = zero.shard(build().to(device), group, stage=stage, collectives=made)
    optimizer = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return train(model, optimizer, rank, range(5), device=device), cc.traffic(made).total.ratio


@pytest.mark.parametrize("options", [{}, {"loco": cc.LoCoPolicy()}, {"policy": "auto"}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_learn_as_on_the_processor(stage: int, options: dict) -> None:
    found = run_ranks(stage_losses, RANKS, DEVICE, stage, options)
    expected = run_ranks(stage_losses, RANKS, "cpu", stage, options)
    for (losses, ratio), (theirs, _) in zip(found, expected, strict=True):
        assert losses == pytest.approx(theirs, rel=1e-3)
        assert ratio > 1.5 or "policy" in options


def hook_gradients(rank: int, device: str, kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64)).to(
        device
    )
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group_on(device))
    wrapped.register_comm_hook(None, cc.ddp_hook(kind))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)).to(device)
    wrapped(x).square().mean().backward()
    return torch.cat([param.grad.reshape(-1) for param in model.parameters()]).cpu()


@pytest.mark.parametrize("kind", ["int8", "int4", "1bit", "bf16"])
def test_hooks_of_ddp(kind: str) -> None:
    found = run_ranks(hook_gradients, RANKS, DEVICE, kind)
    assert torch.equal(found[0], found[1])
    expected = run_ranks(hook_gradients, RANKS, "cpu", kind)[0]
    far = float((found[0] - expected).norm() / expected.norm())
    assert far < 1e-2  # a value at the edge of two codes may take the other
