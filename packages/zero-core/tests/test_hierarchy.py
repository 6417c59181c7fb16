"""Shards inside a node, replicas across: as plain averaging over all ranks, and replicas alike to the last bit."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from branching_models import KINDS, Model, what
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from zero_core.groups import resolve_groups
from zero_core.hierarchy import Chain, HierarchicalCollectives
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, loss_of, plain_copy, relative_error, seeded


def two_axes(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))


def equal_on_all_ranks(tensors: dict[str, torch.Tensor]) -> bool:
    flat = torch.cat([tensor.double().flatten() for tensor in tensors.values()])
    first = flat.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, flat)


def train(rank: int, replicas: int, shards: int, stage: int, accumulate: int, messages: bool) -> float:
    start = seeded(lambda: Net(unused=True), seed=rank)  # the first rank's values win
    plain = plain_copy(seeded(lambda: Net(unused=True)))
    collectives = (
        (lambda group: zero.PlainCollectives(group, 20.0, shared_memory=False)) if messages else None
    )
    model = zero.shard(start, two_axes(replicas, shards), stage=stage, collectives=collectives)
    # Not Adam, which makes much of rounding: sums have another order here.
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    inner = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    world_size = replicas * shards
    ids = [list(batches(r, 5 * accumulate)) for r in range(world_size)]
    for step in range(5):
        for micro in range(accumulate):
            loss_of(model, ids[rank][step * accumulate + micro]).backward()
            for r in range(world_size):
                (loss_of(plain, ids[r][step * accumulate + micro]) / world_size).backward()
        norm = zero.clip_grad_norm(opt, 0.5)
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
        opt.step()
        opt.zero_grad()
        inner.step()
        inner.zero_grad()
    found = zero.full_state_dict(model)
    assert equal_on_all_ranks(found)
    assert relative_error(found, seeded(lambda: Net(unused=True)).state_dict()) > 1e-3, "nothing was trained"
    return relative_error(found, plain.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("replicas", "shards", "accumulate"), [(2, 2, 1), (2, 2, 3), (3, 1, 1)])
def test_equals_plain_averaging(stage: int, replicas: int, shards: int, accumulate: int) -> None:
    for error in run_ranks(train, replicas * shards, replicas, shards, stage, accumulate, False):
        assert error <= 2e-6


@pytest.mark.parametrize("stage", [1, 3])
def test_over_messages(stage: int) -> None:
    for error in run_ranks(train, 4, 2, 2, stage, 2, True):
        assert error <= 2e-6


def other_ways(rank: int, kind: str) -> float:
    start = seeded(Model)
    plain = plain_copy(start)
    model = zero.shard(start, two_axes(2, 2), stage=3, overlap=zero.Overlap(timeout_s=20))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.05))
    inner = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(5):
        model(**what(kind, rank, step)).backward()
        for r in range(4):
            (plain(**what(kind, r, step)) / 4).backward()
        opt.step()
        opt.zero_grad()
        inner.step()
        inner.zero_grad()
    found = zero.full_state_dict(model)
    assert equal_on_all_ranks(found)
    return relative_error(found, plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_may_take_other_ways(kind: str) -> None:
    for error in run_ranks(other_ways, 4, kind):
        assert error <= 2e-6


def built_as_shards(rank: int) -> bool:
    mesh = two_axes(2, 2)
    with zero.sharded_init(mesh, stage=3):
        torch.manual_seed(rank // 2)  # replicas draw other numbers
        model = Net()
    zero.shard(model, mesh, stage=3)
    return equal_on_all_ranks(zero.full_state_dict(model))


def test_replicas_built_from_other_random_numbers_are_alike() -> None:
    assert run_ranks(built_as_shards, 4) == [True] * 4


def loaded_and_set(rank: int) -> tuple[float, bool]:
    model = zero.shard(seeded(Net), two_axes(2, 2), stage=3)
    other = seeded(Net, seed=7).state_dict()
    zero.load_full_state_dict(model, other if rank == 0 else None)
    error = relative_error(zero.full_state_dict(model), other)
    wanted = torch.arange(19.0)
    zero.set_full(model, "norm.bias", wanted if rank == 0 else None)
    with zero.materialized(model):
        kept = torch.equal(model.norm.bias, wanted)
    only_first = zero.full_state_dict(model, rank0_only=True)
    assert bool(only_first) == (rank == 0)
    return error, kept


def test_values_come_from_the_first_rank_of_all() -> None:
    assert run_ranks(loaded_and_set, 4) == [(0.0, True)] * 4


def bytes_of_states(rank: int) -> int:
    model = zero.shard(nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), two_axes(2, 2), stage=3)
    return sum(unit.shard.numel() for unit in zero.sharded(model).units)


def test_a_rank_holds_its_part_of_a_node() -> None:
    numel = 8 * (64 * 64 + 64)
    assert run_ranks(bytes_of_states, 4) == [numel // 2] * 4


class Counting:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self.inner, self.size = zero.PlainCollectives(group), group.size()
        self.received = 0

    def all_gather(self, shard, out, *, tag):
        self.received += out.numel() * (self.size - 1) // self.size
        return self.inner.all_gather(shard, out, tag=tag)

    def reduce_scatter(self, full, out, *, tag):
        self.received += full.numel() * (self.size - 1) // self.size
        return self.inner.reduce_scatter(full, out, tag=tag)

    def trim(self):
        self.inner.trim()


def traffic(rank: int) -> tuple[int, int]:
    groups = resolve_groups(two_axes(2, 2))
    assert groups.replicate is not None
    inside, across = Counting(groups.shard), Counting(groups.replicate)
    both = HierarchicalCollectives(inside, across, groups.replicate)
    full, out = torch.full((1024,), float(rank)), torch.empty(512)
    both.reduce_scatter(full, out, tag=3).wait()
    assert out.tolist() == [1.5] * 512
    return inside.received, across.received


def test_little_travels_across() -> None:
    n, shards, replicas = 1024, 2, 2
    expected = n * (shards - 1) // shards, 2 * (n // shards) * (replicas - 1) // replicas
    assert run_ranks(traffic, 4) == [expected] * 4


def dies(rank: int, stage: int) -> tuple[str, float]:
    model = zero.shard(seeded(Net), two_axes(2, 2), stage=stage, overlap=zero.Overlap(timeout_s=4.0))
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step, ids in enumerate(batches(rank, 2)):
        if rank == 3 and step == 1:
            os._exit(17)
        start = time.monotonic()
        try:
            loss_of(model, ids).backward()
            opt.step()
            opt.zero_grad()
        except zero.CollectiveError as error:
            return str(error), time.monotonic() - start
    return "", 0.0


@pytest.mark.parametrize("stage", [2, 3])
def test_a_replica_that_dies_ends_all(stage: int) -> None:
    for message, seconds in run_ranks(dies, 4, stage, tolerate=(0, 1, 2, 3), timeout_s=60)[:3]:
        assert "rank" in message
        assert seconds < 20


@pytest.mark.parametrize("names", [("pp", "tp"), ("dp_replicate", "tp")])
def test_a_mesh_without_data_parallel_dimension_is_refused(names: tuple[str, str]) -> None:
    run_ranks(refused, 1, names)


def refused(rank: int, names: tuple[str, str]) -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
    with pytest.raises(
        zero.ZeroConfigError, match="expected one dimension, or one named 'dp', or 'dp_shard'"
    ):
        zero.shard(nn.Linear(2, 2), mesh, stage=3)


class Coming:
    """A handle that has come when it is looked at for the `looks`-th time."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.waited = False

    def is_done(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def wait(self) -> None:
        self.waited = True


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("second", [1, 2, 3])
def test_a_chain_is_done_when_its_last_step_is_and_not_before(first: int, second: int) -> None:
    started: list[Coming] = []

    def step(looks: int) -> Coming:
        started.append(Coming(looks))
        return started[-1]

    chain = Chain([lambda: step(first), lambda: step(second)])
    while not chain.is_done():
        assert len(started) == 1 or started[1].looks > 0
    assert len(started) == 2, "done, and its last step had not begun: whoever waits holds up the others"
    assert started[0].waited
    assert started[1].looks <= 0
