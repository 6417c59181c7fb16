"""A model on a CUDA device whose shards rest in stores: the bits of the same stage without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
import zero_offload_nvme as off
from stored_models import AllUsed, batch, loss_of, stores
from torch.distributed.device_mesh import init_device_mesh

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WHATS = {1: ["optimizer"], 2: ["optimizer", "grads", "all"], 3: ["optimizer", "params", "all"]}
PLACES = [
    (stage, what, kind) for stage, whats in WHATS.items() for what in whats for kind in ("host", "nvme")
]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """This process alone."""
    backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[DEVICE]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_on_device(stage: int, store, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    mesh = init_device_mesh(DEVICE, (1,), mesh_dim_names=("dp",))
    net = AllUsed().to(DEVICE)
    return zero.shard(net, mesh, stage=stage, precision=zero.Precision(compute=dtype), store=store)


def trained(
    stage: int,
    store,
    dtype: torch.dtype,
    *,
    overlap: str = "exact",
    clip: float | None = 0.5,
    promised: bool = False,
    zenflow: off.ZenFlow | None = None,
    steps: int = 5,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the parameters in the end."""
    model = model_on_device(stage, store, dtype)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if store is None:
        opt = zero.ShardedOptimizer(model, inner)
    else:
        opt = off.OffloadedOptimizer(model, inner, overlap=overlap, zenflow=zenflow, window_bytes=1 << 16)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step, 0).to(DEVICE))
        with opt.last_backward() if promised else nullcontext():
            loss.backward()
        if clip is not None:
            zero.clip_grad_norm(opt, clip)
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    if isinstance(opt, off.OffloadedOptimizer):
        opt.flush()
    return losses, zero.full_state_dict(model)


def check_same(found, expected) -> None:
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(found[1][name].cpu(), value.cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stage", "what", "kind"), PLACES)
def test_bit_for_bit(tmp_path, stage: int, what: str, kind: str, dtype: torch.dtype) -> None:
    found = trained(stage, stores(kind, what, stage, str(tmp_path)), dtype)
    check_same(found, trained(stage, None, dtype))


@pytest.mark.parametrize("kind", ["host", "nvme"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_that_begin_during_backward(tmp_path, stage: int, kind: str) -> None:
    expected = trained(stage, None, torch.bfloat16, clip=None)
    promised = trained(
        stage, stores(kind, "all", stage, str(tmp_path)), torch.bfloat16, clip=None, promised=True
    )
    check_same(promised, expected)
    store = stores(kind, "all", stage, str(tmp_path))
    check_same(trained(stage, store, torch.bfloat16, overlap="speculative", clip=None), expected)


def test_a_speculative_step_that_is_clipped(tmp_path) -> None:
    expected = trained(2, None, torch.bfloat16, clip=1e-3)
    store = stores("host", "all", 2, str(tmp_path))
    check_same(trained(2, store, torch.bfloat16, overlap="speculative", clip=1e-3), expected)


@pytest.mark.parametrize("overlap_step", [False, True])
@pytest.mark.parametrize("kind", ["host", "nvme"])
def test_zenflow_is_that_of_the_processor(tmp_path, monkeypatch, kind: str, overlap_step: bool) -> None:
    """What is computed does not depend on where: the kernels have the same bits, torch's sums of gradients nearly."""
    policy = off.ZenFlow(topk_ratio=0.1, update_interval=2, overlap_step=overlap_step)
    found = trained(
        2, stores(kind, "all", 2, str(tmp_path)), torch.float32, overlap="zenflow", zenflow=policy
    )
    monkeypatch.setattr(f"{__name__}.DEVICE", "cpu")
    expected = trained(
        2, stores(kind, "all", 2, str(tmp_path)), torch.float32, overlap="zenflow", zenflow=policy
    )
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name].cpu(), value.cpu(), rtol=1e-3, atol=1e-3)


def test_device_memory_does_not_grow_with_states(tmp_path) -> None:
    """12 bytes an element of masters and moments rest elsewhere."""
    live = {}
    for kind in ("none", "host", "nvme"):
        model = model_on_device(2, stores(kind, "all", 2, str(tmp_path)), torch.bfloat16)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        made = zero.ShardedOptimizer if kind == "none" else off.OffloadedOptimizer
        opt = made(model, inner)
        loss_of(model, batch(0, 0).to(DEVICE)).backward()
        opt.step()
        opt.zero_grad()
        torch.cuda.synchronize()
        live[kind] = torch.cuda.memory_allocated()
        elements = sum(param.numel() for param in model.parameters())
        del model, inner, opt
    for kind in ("host", "nvme"):
        assert live["none"] - live[kind] > 10 * elements


def test_shards_are_brought_beside_compute(tmp_path) -> None:
    """The host runs ahead of the device: it waits for no copy of a shard that rests in its memory."""
    model = model_on_device(3, zero.Stores(params=off.HostStore()), torch.bfloat16)
    ids = batch(0, 0).to(DEVICE)
    with torch.no_grad():
        for _ in range(3):  # the order of use is known then
            model(ids)
        torch.cuda.synchronize()
        torch.cuda._sleep(1 << 31)  # the better part of a second or more
        asleep = torch.cuda.Event()
        asleep.record()
        model(ids)
    assert not asleep.query()
