"""Training through the compressed collectives, at every stage: bit for bit what the simulation says."""

from __future__ import annotations

from functools import partial

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from compress_lab import (
    SimulatedCollectives,
    batch,
    build,
    loss_of,
    shard,
    simulated_gather,
    simulated_reduce,
    train,
)
from zero_core.testing import run_ranks

STEPS = range(3)
EVERYTHING = {"weights": "int8", "grads": "int4", "secondary": True}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], v) for n, v in expected.items())


def trained(rank: int, stage: int, collectives, accumulate: int = 1, **more) -> tuple[dict, list[float]]:
    model, opt = shard(build(), stage, collectives, **more)
    losses = train(model, opt, rank, STEPS, accumulate)
    return zero.full_state_dict(model), losses


# -- against zero-core's own ----------------------------------------------------------------------------------


def compare_hpz(rank: int, node_size: int) -> tuple[int, int, float]:
    """hpZ alone changes no bit, whatever is accumulated, recomputed or evaluated in between."""
    made = cc.QuantizedCollectives(weights=None, grads=None, node_size=node_size, secondary=True)
    for collectives in (None, made):
        model, opt = shard(build(), 3, collectives)
        zero.checkpoint_modules(model, [type(model.blocks[0])], zero.CheckpointPolicy())
        losses = train(model, opt, rank, range(2), accumulate=2)
        with torch.no_grad():
            losses.append(float(loss_of(model, batch(rank, 99))))
        with zero.no_sync(model):
            loss_of(model, batch(rank, 100)).backward()
        losses += train(model, opt, rank, range(2, 4))
        state = zero.full_state_dict(model), losses
        if collectives is None:
            expected = state
    assert same(state[0], expected[0])
    assert state[1] == expected[1]
    traffic = cc.traffic(made)
    return (
        traffic.line("gather").calls,
        traffic.line("gather_again").calls,
        traffic.line("gather_again").ratio,
    )


@pytest.mark.parametrize(("world", "node_size"), [(4, 2), (2, 1), (2, 2)])
def test_hpz_alone_changes_no_bit(world: int, node_size: int) -> None:
    for first, again, _ in run_ranks(compare_hpz, world, node_size):
        if node_size == world:
            assert again == 0, "within one node there is nothing nearer than the shards"
        else:
            assert again > first > 0


# -- against the simulation -----------------------------------------------------------------------------------


def compare(rank: int, world: int, node_size: int, stages: tuple[int, ...], dtype, accumulate: int) -> None:
    grid = Grid(world, node_size)
    precision = zero.Precision(compute=dtype)
    of_stage = {}
    for stage in stages:
        kept = EVERYTHING if stage == 3 else {**EVERYTHING, "secondary": False}
        made = cc.QuantizedCollectives(**kept, node_size=node_size, min_bytes=0)
        found, losses = trained(rank, stage, made, accumulate, precision=precision)
        simulate = partial(SimulatedCollectives, grid=grid, weights=BlockFormat(8), grads=BlockFormat(4))
        expected, expected_losses = trained(rank, stage, simulate, accumulate, precision=precision)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6)
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        plain, _ = trained(rank, stage, None, accumulate, precision=precision)
        assert not same(found, plain), "nothing was quantized"
        of_stage[stage] = losses
    for losses in of_stage.values():
        assert losses[:accumulate] == of_stage[stages[0]][:accumulate], (
            "the first forwards see the same weights"
        )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("world", "node_size", "accumulate"), [(2, 1, 1), (4, 2, 2)])
def test_equal_to_the_simulation(world: int, node_size: int, accumulate: int, dtype) -> None:
    run_ranks(compare, world, world, node_size, (1, 2, 3), dtype, accumulate)


def whole_story(rank: int, world: int, stage: int) -> float:
    """A plain loop over flat units, on each rank by itself: no process group, no sharding, the equations alone."""
    node_size = 2 if world == 4 else 1
    made = cc.QuantizedCollectives(
        **{**EVERYTHING, "secondary": stage == 3}, node_size=node_size, min_bytes=0
    )
    model = zero.shard(build(), dist.group.WORLD, stage=stage, collectives=made)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9))
    losses = train(model, opt, rank, STEPS)
    found = zero.full_state_dict(model)

    plain, grid = build(), Grid(world, node_size)
    layouts = [unit.layout for unit in zero.sharded(model).units]
    params = dict(plain.named_parameters())
    masters = []
    for layout in layouts:
        flat = torch.zeros(layout.numel)
        for slot in layout.slots:
            flat[slot.offset : slot.stop] = params[slot.name].detach().reshape(-1)
        masters.append(torch.nn.Parameter(flat))
    inner = torch.optim.SGD(masters, lr=0.5, momentum=0.9)
    expected_losses = []
    for step in STEPS:
        for layout, master in zip(layouts, masters, strict=True):
            full = master.detach()
            if world > 1:
                full = simulated_gather(list(full.view(world, -1)), BlockFormat(8))
            for slot in layout.slots:
                params[slot.name].data.copy_(full[slot.offset : slot.stop].view(slot.shape))
        fulls: list[list[torch.Tensor]] = [[] for _ in layouts]
        for r in range(world):
            plain.zero_grad()
            loss = loss_of(plain, batch(r, step))
            loss.backward()
            if r == rank:
                expected_losses.append(float(loss))
            for position, layout in enumerate(layouts):
                flat = torch.zeros(layout.numel)
                for slot in layout.slots:
                    flat[slot.offset : slot.stop] = params[slot.name].grad.reshape(-1)
                fulls[position].append(flat)
        for master, each in zip(masters, fulls, strict=True):
            master.grad = torch.cat(simulated_reduce(each, grid, BlockFormat(4))) if world > 1 else each[0]
        inner.step()
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    worst = 0.0
    for layout, master in zip(layouts, masters, strict=True):
        for slot in layout.slots:
            value = master.detach()[slot.offset : slot.stop].view(slot.shape)
            worst = max(worst, float((found[slot.name] - value).abs().max()))
    return worst


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_to_one_process(world: int, stage: int) -> None:
    for worst in run_ranks(whole_story, world, world, stage):
        assert worst < 1e-6


# -- each alone, other places ---------------------------------------------------------------------------------


def each_alone(rank: int, stage: int) -> dict[str, tuple[float, float]]:
    """How far the final weights are from plain training, and what travelled."""
    plain, _ = trained(rank, stage, None)
    found = {}
    for name, options in {
        "qwZ": {"weights": "int8", "grads": None},
        "qwZ int4": {"weights": "int4", "grads": None},
        "qgZ": {"weights": None, "grads": "int4"},
        "qgZ int8": {"weights": None, "grads": "int8"},
        "none": {"weights": None, "grads": None},
    }.items():
        made = cc.QuantizedCollectives(**options, node_size=2, min_bytes=0)
        state, _ = trained(rank, stage, made)
        error = max(float((state[n] - v).abs().max()) for n, v in plain.items())
        traffic = cc.traffic(made)
        found[name] = error, traffic.line("gather").ratio, traffic.line("reduce").ratio
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_alone(stage: int) -> None:
    found = run_ranks(each_alone, 2, stage)[0]
    assert found["none"] == (0.0, 1.0, 1.0)
    for name, (error, gather, reduce) in found.items():
        if name == "none" or ("qwZ" in name and stage == 0):
            assert error == 0.0
            continue
        assert 0 < error < 0.1, (name, error)
        assert (gather > 3) == ("qwZ" in name)
        assert (reduce > 3) == ("qgZ" in name)


def everyone_agrees(rank: int, stage: int) -> list[float]:
    """What ranks compute with; a loss of the same batch on every rank."""
    made = cc.QuantizedCollectives(**{**EVERYTHING, "secondary": stage == 3}, node_size=2, min_bytes=0)
    model, opt = shard(build(), stage, made)
    seen = []
    for step in STEPS:
        with torch.no_grad():
            seen.append(float(loss_of(model, batch(0, step))))
        train(model, opt, rank, range(step, step + 1))
    return seen


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_compute_with_the_same_weights(stage: int) -> None:
    first, *others = run_ranks(everyone_agrees, 4, stage)
    assert all(other == first for other in others)


def with_mesh(rank: int) -> list[list[float]]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    results = []
    for where in ({"mesh": mesh}, {"node_size": 2}):
        made = cc.QuantizedCollectives(**EVERYTHING, **where, min_bytes=0)
        results.append(trained(rank, 3, made)[1])
    return results


def test_nodes_from_a_mesh() -> None:
    for by_mesh, by_number in run_ranks(with_mesh, 4):
        assert by_mesh == by_number


def with_replicas(rank: int) -> tuple[list[float], list[float]]:
    """Shards within two ranks, replicas across: gathers and the reduction inside are quantized."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    made = cc.QuantizedCollectives(**EVERYTHING, node_size=1, min_bytes=0)
    losses = []
    for collectives in (made, None):
        model = zero.shard(build(), mesh, stage=3, collectives=collectives)
        opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        losses.append(train(model, opt, rank, STEPS))
    assert cc.traffic(made).line("gather_again").calls
    assert cc.traffic(made).line("reduce").ratio > 5
    return losses[0], losses[1]


def test_with_replicas() -> None:
    for found, plain in run_ranks(with_replicas, 4):
        assert found != plain
        assert found == pytest.approx(plain, rel=0.05)
