"""What a configuration file cannot say, or says for zero-core: whole tensors, parameters that stay, replicas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
import zerostack
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from zero_core.testing import run_ranks
from zerostack import ConfigError
from zerostack_models import Small, batch, config

STEPS = 4


class NormalizedSGD(torch.optim.Optimizer):
    """Each parameter moves by `lr` along its gradient, whatever its length: the trust ratio of LARS and LAMB."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad / (param.grad.norm() + 1e-6), alpha=-group["lr"])


def train(engine, rank):
    losses = []
    for step in range(STEPS):
        loss = engine(batch(step, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def ddp(rank, make):
    model = DistributedDataParallel(Small())
    optimizer = make(model.parameters())
    losses = []
    for step in range(STEPS):
        loss = model(batch(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


ASKED = ("whole_tensors", "placement", "mesh_device", "publish_late")


def engine(stage, make=None, **more):
    asked = {name: more.pop(name) for name in ASKED if name in more}
    raw = config(stage, **more)
    if make is not None:
        del raw["optimizer"]
    return zerostack.initialize(
        model=Small(), optimizer=make, config=raw | {"gradient_clipping": 0}, **asked
    )[0]


def whole_tensors_rank(rank):
    make = lambda params: NormalizedSGD(params, lr=0.05)  # noqa: E731
    expected = ddp(rank, make)
    for stage in range(4):
        assert train(engine(stage, make, whole_tensors=True), rank) == pytest.approx(expected, rel=1e-5), (
            stage
        )
    assert train(engine(2, make), rank) != pytest.approx(expected, rel=1e-5)  # it had to be said
    adafactor = lambda params: torch.optim.Adafactor(params, lr=0.05)  # noqa: E731
    expected = ddp(rank, adafactor)
    for stage in (1, 3):
        assert train(engine(stage, adafactor), rank) == pytest.approx(expected, rel=1e-5), stage


def test_optimizers_of_whole_tensors_train_as_under_ddp():
    run_ranks(whole_tensors_rank, 2)


def replicas_rank(rank, root):
    expected = train(engine(3), rank)
    apart = engine(3, zero_optimization={"stage": 3, "mics_shard_size": 2})
    held = sum(shard.local.numel() for shard in zero.sharded_state(apart.module, None).values())
    whole = sum(p.numel() for p in Small().parameters())
    assert abs(held - whole / 2) < 64  # a half each, not a quarter
    assert apart.world_size == 4
    assert train(apart, rank) == pytest.approx(expected, rel=1e-5)
    named = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    assert train(engine(3, mesh_device=named), rank) == pytest.approx(expected, rel=1e-5)
    stays = zero.Placement(whole_modules=torch.nn.Embedding)
    assert train(engine(3, placement=stays), rank) == expected
    assert train(engine(2, publish_late=True), rank) == train(engine(2), rank)

    apart.save_checkpoint(root)
    together = engine(1)
    together.load_checkpoint(root)
    assert train(together, rank) == pytest.approx(train(apart, rank), rel=1e-5)

    for size, mesh, message in [
        (3, None, "a divisor of the 4 ranks, got 3"),
        (2, named, "mesh_device=.* decides"),
    ]:
        with pytest.raises(ConfigError, match=f"zero_optimization.mics_shard_size: .*{message}"):
            engine(3, zero_optimization={"stage": 3, "mics_shard_size": size}, mesh_device=mesh)
    dist.barrier()


def test_shards_inside_a_node_and_replicas_across(tmp_path):
    run_ranks(replicas_rank, 4, tmp_path)
