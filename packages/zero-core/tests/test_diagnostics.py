"""What is reported is what happened: bytes to the byte, prefetches, waits, peaks; and the trace shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh

BLOCKS, WIDTH = 6, 64


def sharded(world_size: int, stage: int, **kwargs):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)))
    model = zero.shard(model, dp_mesh(world_size), stage=stage, **kwargs)
    return model, zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=1e-3))


def step(model: nn.Module, opt: zero.ShardedOptimizer) -> None:
    model(torch.randn(2, WIDTH)).sum().backward()
    opt.step()
    opt.zero_grad()


def measure(rank: int, world_size: int, stage: int, prefetch: bool) -> dict[str, float]:
    model, opt = sharded(world_size, stage, overlap=zero.Overlap(prefetch_bytes=None if prefetch else 0))
    step(model, opt)
    step(model, opt)
    zero.diagnostics(model)
    step(model, opt)
    found = zero.diagnostics(model)
    assert zero.diagnostics(model)["gathered_bytes"] == 0, "a report starts anew"
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_are_counted(stage: int) -> None:
    unit, world_size = 4 * WIDTH * WIDTH, 2
    for found in run_ranks(measure, world_size, world_size, stage, True):
        received = unit * (world_size - 1) // world_size
        gathers = BLOCKS if stage < 3 else 2 * BLOCKS - 1
        assert found["gathers"] == gathers
        assert found["gathered_bytes"] == gathers * received
        assert found["reductions"] == BLOCKS
        assert found["reduced_bytes"] == BLOCKS * received
        assert 0 <= found["hidden_fraction"] <= 1
        assert found["on_the_way_s"] >= found["gather_waited_s"] + found["reduce_waited_s"] > 0
        assert found["resting_parameter_bytes"] == unit * BLOCKS / (world_size if stage == 3 else 1)
        assert found["gradient_shard_bytes"] == 0, "zero_grad gave them back"
        if stage == 3:
            assert unit <= found["peak_whole_parameter_bytes"] <= 3 * unit
            assert (found["prefetch_hits"], found["prefetch_misses"]) == (2 * BLOCKS - 2, 1)
        assert unit <= found["peak_full_gradient_bytes"] <= (BLOCKS if stage == 1 else 3) * unit


def test_without_prefetch_every_gather_is_a_miss() -> None:
    for found in run_ranks(measure, 2, 2, 3, False):
        assert (found["prefetch_hits"], found["prefetch_misses"]) == (0, 2 * BLOCKS - 1)


def traced(rank: int, world_size: int, stage: int, folder: str) -> None:
    model, opt = sharded(world_size, stage)
    step(model, opt)
    path, png = Path(folder, f"{rank}.json"), Path(folder, f"{rank}.png")
    step(model, opt)
    zero.diagnostics(model)
    with zero.trace(model, path, png=png) as events:
        step(model, opt)
        step(model, opt)
    assert zero.diagnostics(model)["prefetch_misses"] <= 2, "tracing changes the order of gathers"
    rows = json.loads(path.read_text())["traceEvents"]
    bars = [row for row in rows if row["ph"] == "X"]
    assert len(bars) == len(events)
    count = {
        kind: sum(row["cat"] == kind for row in bars) for kind in ("forward", "backward", "gather", "reduce")
    }
    assert count["forward"] == count["backward"] == 2 * BLOCKS
    assert count["reduce"] == 2 * BLOCKS
    assert count["gather"] >= 2 * BLOCKS
    assert all(row["dur"] >= row["args"]["waited_us"] >= 0 for row in bars)
    assert {row["pid"] for row in rows} == {rank}
    assert png.read_bytes().startswith(b"\x89PNG")
    forward = [row["ts"] for row in bars if row["cat"] == "forward"]
    assert forward == sorted(forward)
    step(model, opt)
    assert len(events) == len(bars), "the trace has ended"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trace_shows_compute_and_collectives(stage: int, tmp_path: Path) -> None:
    run_ranks(traced, 2, 2, stage, str(tmp_path))


class WritesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x).mul_(2.0).square().mean()


def traced_in_place(rank: int, stage: int, folder: str) -> tuple[int, bool]:
    model = zero.shard(WritesInPlace(), dp_mesh(2), stage=stage, units=nn.Linear)
    with zero.trace(model, Path(folder, f"{rank}.json")) as events:
        model(torch.randn(2, WIDTH)).backward()
    backward = [event for event in events if event.row == "backward"]
    return len(backward), all(event.seconds > 0 for event in backward)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_writes_in_place_can_be_traced(stage: int, tmp_path: Path) -> None:
    assert run_ranks(traced_in_place, 2, stage, str(tmp_path)) == [(2, True)] * 2
