"""torch.compile on a sharded model, a unit at a time: the same numbers."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded


def compiled(rank: int, world_size: int, stage: int, when: str) -> tuple[float, int]:
    start = seeded(Net)
    plain = plain_copy(start)
    torch._dynamo.reset()
    if when == "before":
        for block in start.blocks:
            block.compile(backend="aot_eager")
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    if when == "after":
        for block in model.blocks:
            block.compile(backend="aot_eager")
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch._dynamo.utils.counters.clear()
    for index, ids in enumerate(batches(rank, 4)):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        for r in range(world_size):
            (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()
        inner.step()
        inner.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return relative_error(zero.full_state_dict(model), plain.state_dict()), graphs


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_units_train_alike(stage: int, when: str) -> None:
    for error, graphs in run_ranks(compiled, 2, 2, stage, when, timeout_s=240):
        assert graphs > 0, "nothing was compiled"
        assert error <= 5e-6


def counted(rank: int, world_size: int, stage: int, what: str) -> tuple[float, list[int], int, int]:
    """Graphs after each step, and graph breaks, of the whole model or its blocks under torch.compile."""
    start = seeded(Net)
    plain = plain_copy(start)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    if what == "model":
        model.compile(backend="aot_eager")
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    graphs = []
    for index, ids in enumerate(batches(rank, 5)):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for r in range(world_size):
            (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()
        inner.step()
        inner.zero_grad()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    units = len(zero.sharded(model).units)
    return relative_error(zero.full_state_dict(model), plain.state_dict()), graphs, breaks, units


@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.parametrize("stage", [2, 3])
def test_few_graphs_and_none_after_the_second_step(stage: int, what: str) -> None:
    for error, graphs, breaks, units in run_ranks(counted, 2, 2, stage, what, timeout_s=240):
        assert error <= 5e-6
        assert graphs[0] > 0, "nothing was compiled"
        assert graphs[1:] == graphs[1:2] * 4, "compiled again"
        assert breaks <= units
