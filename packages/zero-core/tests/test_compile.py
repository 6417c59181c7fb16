"""torch.compile before or after `shard`, of the model or of its blocks: the same numbers, few graph breaks."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, plain_copy, relative_error, seeded

STEPS = 5


def compile_parts(model: nn.Module, what: str) -> nn.Module:
    """Compile in place, or (wrapped) as `torch.compile` returns it."""
    if what == "wrapped":
        return torch.compile(model, backend="aot_eager")
    for part in [model] if what == "model" else model.blocks:
        part.compile(backend="aot_eager")
    return model


def counted(
    rank: int, world_size: int, stage: int, when: str, what: str
) -> tuple[float, list[int], int, int]:
    """The error against plain torch, graphs after each step, graph breaks, and units."""
    model = seeded(Net)
    plain = plain_copy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if when == "before":
        model = compile_parts(model, what)
    model = zero.shard(model, dp_mesh(world_size), stage=stage)
    if when == "after":
        model = compile_parts(model, what)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    graphs = []
    for index, ids in enumerate(batches(rank, STEPS)):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for r in range(world_size):
            (loss_of(plain, list(batches(r, index + 1))[index]) / world_size).backward()
        inner.step()
        inner.zero_grad()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    # The names of what was sharded: a wrapper, or what it was put around afterwards.
    values = {name.removeprefix("_orig_mod."): value for name, value in zero.full_state_dict(model).items()}
    return relative_error(values, plain.state_dict()), graphs, breaks, len(zero.sharded(model).units)


@pytest.mark.parametrize("what", ["model", "wrapped", "blocks"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_few_graphs_and_none_after_the_second_step(stage: int, when: str, what: str) -> None:
    for error, graphs, breaks, units in run_ranks(counted, 2, 2, stage, when, what, timeout_s=240):
        assert error <= 5e-6
        assert graphs[0] > 0, "nothing was compiled"
        assert graphs[1:] == graphs[1:2] * (STEPS - 1), "compiled again"
        assert breaks <= units
