"""Models built directly as shards have the values of a plain construction, and no rank ever holds them whole."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from torch import nn
from zero_core.params import ReleasedParameter
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded


class Custom(Net):
    """Initialises everything again at the end of the constructor, copies a block, and ties late."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = copy.deepcopy(self.blocks[0])
        self.apply(self.initialise)
        self.head = nn.Linear(19, 31, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.norm.weight.copy_(torch.arange(19.0))
            self.blocks[1].up.weight[3] = 7.0

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias) if module.bias is not None else None


def built_like_plain(rank: int, world_size: int, stage: int, whole_bytes: int | None) -> float:
    mesh = dp_mesh(world_size)
    expected = seeded(Custom).state_dict()
    torch.manual_seed(0)
    with zero.sharded_init(mesh, stage=stage, whole_bytes=whole_bytes):
        model = Custom()
    assert stage < 3 or all(isinstance(p, ReleasedParameter) for p in model.parameters())
    model = zero.shard(model, mesh, stage=stage)
    found = zero.full_state_dict(model)
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    assert relative_error(zero.full_state_dict(model), found) > 0
    return relative_error(found, expected)


@pytest.mark.parametrize(("stage", "whole_bytes"), [(2, None), (3, 0), (3, 5000), (3, 1 << 30)])
def test_same_values_as_a_plain_construction(stage: int, whole_bytes: int | None) -> None:
    assert run_ranks(built_like_plain, 3, 3, stage, whole_bytes) == [0.0] * 3


def peak_while_building(rank: int, world_size: int) -> tuple[int, int]:
    peak = 0
    layers: list[nn.Module] = []

    def whole_bytes() -> int:
        return sum(p.untyped_storage().nbytes() for layer in layers for p in layer.parameters())

    with zero.sharded_init(dp_mesh(world_size), whole_bytes=0):
        for _ in range(10):
            layers.append(nn.Linear(64, 64))
            nn.init.ones_(layers[0].weight)
            peak = max(peak, whole_bytes())
    assert whole_bytes() == 0
    return peak, sum(p.numel() * 4 for layer in layers for p in layer.parameters())


def test_never_whole_on_any_rank() -> None:
    for peak, total in run_ranks(peak_while_building, 2, 2):
        assert 0 < peak <= total / 10 * 1.1


def from_meta(rank: int, world_size: int, stage: int) -> None:
    mesh = dp_mesh(world_size)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3)))
    before = list(model.parameters())
    torch.manual_seed(rank)
    model = zero.shard(model, mesh, stage=stage)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    state = zero.full_state_dict(model)
    assert (state["0.1.weight"] == 1).all()
    assert (state["0.1.running_var"] == 1).all()
    weight = state["1.0.weight"]
    assert 0.1 < weight.std() < 0.4
    assert weight.abs().max() <= 8**-0.5
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(before, lr=0.1))
    model(torch.randn(4, 8)).square().mean().backward()
    opt.step()
    assert relative_error(zero.full_state_dict(model), state) > 0

    with torch.device("meta"):
        custom = nn.ModuleList([Net().blocks[0]])
    with pytest.raises(zero.ZeroConfigError, match="no reset_parameters: pass init_module="):
        zero.shard(custom, mesh, stage=stage)

    def fill(module: nn.Module) -> None:
        for param in module.parameters(recurse=False):
            param.fill_(0.5)

    custom = zero.shard(custom, mesh, stage=stage, init_module=fill)
    assert all((v == 0.5).all() for v in zero.full_state_dict(custom).values())


@pytest.mark.parametrize("stage", [0, 3])
def test_meta_models_are_initialised_unit_by_unit(stage: int) -> None:
    run_ranks(from_meta, 2, 2, stage)


def built_on_the_cpu(rank: int, world_size: int) -> None:
    """A group that sends between accelerators, and a model that is constructed on the CPU."""
    used: list[object] = []
    gather = zero.PlainCollectives.all_gather

    def record(self, shard, out, *, tag):
        used.append(self.group)
        return gather(self, shard, out, tag=tag)

    group = dp_mesh(world_size).get_group()
    expected = seeded(Custom).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["zero_core.sharded_init"], "device_type", lambda mesh, group: "cuda")
        patch.setattr(zero.PlainCollectives, "all_gather", record)
        torch.manual_seed(0)
        with zero.sharded_init(group, whole_bytes=0):
            model = Custom()
    assert used
    assert all(each is not group and dist.get_backend(each) == "gloo" for each in used)
    assert relative_error(zero.full_state_dict(zero.shard(model, group, stage=3)), expected) == 0


def test_a_model_built_on_the_cpu_travels_over_gloo() -> None:
    run_ranks(built_on_the_cpu, 2, 2)
