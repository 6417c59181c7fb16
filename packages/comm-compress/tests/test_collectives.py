"""Every collective equals the paper's equations, worked out in one process, for any ranks, nodes, sizes and dtypes."""

from __future__ import annotations

import itertools

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
from comm_compress.group_collectives import GroupCollectives
from comm_compress.hops import Done
from comm_compress.settings import Settings
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from compress_lab import simulated_gather, simulated_reduce, through
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks

SIZES = (0, 1, 2, 7, 31, 255, 256, 257, 1000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NODES = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4)]


def what_stays(rank: int) -> None:
    """Of a gather that is over, the node's part alone; groups of a mesh are left to those who made it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    made = GroupCollectives(Settings(secondary=True, mesh=mesh, min_bytes=0), dist.group.WORLD)
    assert made.grid.node_size == 2
    for hop, group in (
        (made.reductions.inside, mesh.get_group(1)),
        (made.reductions.across, mesh.get_group(0)),
    ):
        assert hop.group is not group
        assert dist.get_process_group_ranks(hop.group) == dist.get_process_group_ranks(group)
    out = torch.empty(4 * 1000)
    made.gather_weights(lambda: torch.ones(1000), out, tag=1, version=1).wait()
    (kept,) = made.gathers._kept.values()
    assert isinstance(kept.handle.inner, Done)
    assert kept.part.numel() == BlockFormat(8).message_bytes(1000) * 2


def test_what_stays_of_a_gather() -> None:
    run_ranks(what_stays, 4)


def numbers(seed: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator) * torch.rand(numel, generator=generator).exp()).to(dtype)


def check_all(rank: int, world: int, node_size: int, shared_memory: bool) -> int:
    """Compare many cases; returns how many."""
    grid, group, count = Grid(world, node_size), dist.group.WORLD, 0
    for weights, grads in (("int8", "int4"), ("int4", "int8")):
        made = cc.QuantizedCollectives(
            weights=weights,
            grads=grads,
            node_size=node_size,
            secondary=True,
            min_bytes=0,
            shared_memory=shared_memory,
            group=group,
        )
        of_weights, of_grads = (BlockFormat({"int8": 8, "int4": 4}[name]) for name in (weights, grads))
        for tag, (numel, dtype) in enumerate(itertools.product(SIZES, DTYPES)):
            shards = [numbers(10 * tag + r, numel, dtype) for r in range(world)]
            out = torch.full((world * numel,), torch.nan, dtype=dtype)
            made.gather_weights(lambda s=shards: s[rank], out, tag=tag, version=3).wait()
            expected = torch.cat(shards) if world == 1 else simulated_gather(shards, of_weights)
            assert torch.equal(out, expected), (numel, dtype)

            again = torch.full_like(out, torch.nan)
            shard = shards[rank] if node_size == world else None  # in one node nothing nearer is kept
            made.gather_weights(lambda s=shard: s, again, tag=tag, version=3).wait()
            assert torch.equal(again, out), (numel, dtype)

            fulls = [numbers(7000 + 10 * tag + r, world * numel, dtype) for r in range(world)]
            reduced = torch.full((numel,), torch.nan, dtype=dtype)
            made.reduce_scatter(fulls[rank].clone(), reduced, tag=tag).wait()
            if world == 1:
                assert torch.equal(reduced, fulls[0])
            else:
                mean = simulated_reduce(fulls, grid, of_grads)[rank]
                torch.testing.assert_close(
                    reduced, mean.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7
                )

            exact = torch.empty_like(out)
            made.all_gather(shards[rank], exact, tag=tag).wait()
            assert torch.equal(exact, torch.cat(shards))
            count += 1
    return count


@pytest.mark.parametrize(("world", "node_size"), NODES)
def test_equal_to_the_equations(world: int, node_size: int) -> None:
    for shared_memory in (True, False) if world == 4 else (True,):
        assert set(run_ranks(check_all, world, world, node_size, shared_memory)) == {
            2 * len(SIZES) * len(DTYPES)
        }


def check_mixed(rank: int, world: int) -> None:
    """A reduction into another dtype, and into the gradient itself; values that are not finite."""
    made = cc.QuantizedCollectives(node_size=2, min_bytes=0, group=dist.group.WORLD)
    grid, form = Grid(world, 2), BlockFormat(4)
    fulls = [numbers(r, 300 * world, torch.bfloat16) for r in range(world)]
    mean = simulated_reduce(fulls, grid, form)[rank]
    out = torch.empty(300)
    made.reduce_scatter(fulls[rank].clone(), out, tag=1).wait()
    torch.testing.assert_close(out, mean, rtol=1e-6, atol=1e-7)
    full = fulls[rank].clone()
    mine = full.view(world, -1)[rank]
    made.reduce_scatter(full, mine, tag=2).wait()
    torch.testing.assert_close(mine, mean.bfloat16())

    for bad in (torch.inf, torch.nan):
        full = fulls[rank].clone()
        if rank == 1:
            full[3 * 300 + 270] = bad  # the second block of rank 3's slice
        made.reduce_scatter(full, out, tag=3).wait()
        assert bool(out.isfinite().all()) == (rank != 3)
        assert bool(out[:256].isfinite().all())


def test_other_dtypes_in_place_and_not_finite() -> None:
    run_ranks(check_mixed, 4, 4)


def check_stochastic(rank: int, world: int) -> tuple[float, float]:
    """The mean of many reductions: of numbers that lie between two steps of the codec."""
    full = torch.full((world * 256,), 0.3)
    full[::256] = 7.0  # the scale is 1
    errors = []
    for stochastic in (False, True):
        made = cc.QuantizedCollectives(
            grads="int4", stochastic=stochastic, min_bytes=0, group=dist.group.WORLD
        )
        total = torch.zeros(256)
        for _ in range(50):
            out = torch.empty(256)
            made.reduce_scatter(full.clone(), out, tag=1).wait()
            total += out
        errors.append(float((total[1:] / 50 - 0.3).mean().abs()))
    return errors[0], errors[1]


def test_stochastic_rounding_is_right_on_average() -> None:
    for nearest, stochastic in run_ranks(check_stochastic, 2, 2):
        assert nearest == pytest.approx(0.3, rel=1e-3)
        assert stochastic < 0.01


def check_small(rank: int, world: int) -> list[bool]:
    """Below `min_bytes`, and in dtypes that no codec knows: exact."""
    made = cc.QuantizedCollectives(min_bytes=4096, group=dist.group.WORLD)
    exact = []
    for numel, dtype in (
        (511, torch.float32),
        (512, torch.float32),
        (4096, torch.float64),
        (8192, torch.uint8),
    ):
        shards = [numbers(r, numel, torch.float32).mul(9).to(dtype) for r in range(world)]
        out = torch.empty(world * numel, dtype=dtype)
        made.gather_weights(lambda s=shards: s[rank], out, tag=1, version=None).wait()
        exact.append(torch.equal(out, torch.cat(shards)))
        assert exact[-1] == made.is_exact(out.numel() * out.element_size(), dtype), (numel, dtype)
        if dtype.is_floating_point:
            out = torch.empty(numel, dtype=dtype)
            made.reduce_scatter(torch.cat(shards), out, tag=2).wait()
            plain = torch.stack([shards[rank]] * world).mean(0)
            assert torch.allclose(out, plain, rtol=1e-6, atol=0) == exact[-1]
    return exact


def test_small_and_foreign_travel_as_they_are() -> None:
    assert run_ranks(check_small, 1, 1) == [[True] * 4]
    assert run_ranks(check_small, 2, 2) == [[True, False, True, True]] * 2


def check_loco(rank: int, world: int, node_size: int) -> None:
    """Both hops owe what they lose, averaged: the recursion written out, for every rank at once."""
    policy = cc.LoCoPolicy(beta=0.25, reset_steps=3)
    made = cc.QuantizedCollectives(node_size=node_size, loco=policy, min_bytes=0, group=dist.group.WORLD)
    grid, form, numel = Grid(world, node_size), BlockFormat(4), 300
    owed = [torch.zeros(world * numel) for _ in range(world)]
    owed_across = [torch.zeros(world // node_size, numel) for _ in range(world)]
    for call in range(1, 6):
        fulls = [numbers(100 * call + r, world * numel, torch.float32) for r in range(world)]
        out = torch.empty(numel)
        made.reduce_scatter(fulls[rank].clone(), out, tag=1).wait()

        def keep(
            owed_of: torch.Tensor, wanted: torch.Tensor, arrived: torch.Tensor, call: int = call
        ) -> torch.Tensor:
            return torch.zeros_like(wanted) if call % 3 == 0 else 0.25 * owed_of + 0.75 * (wanted - arrived)

        sent = []
        for r in range(world):
            wanted = fulls[r] + owed[r]
            arrived = torch.cat([through(part, form) for part in wanted.view(world, -1)])
            owed[r] = keep(owed[r], wanted, arrived)
            sent.append(arrived.view(world, -1))
        if node_size == 1 or node_size == world:
            mean = torch.stack([each[rank] for each in sent]).sum(0) / world
        else:
            parts = []
            for r in grid.across(rank):  # each node's rank of this place, and what it sends to all nodes
                sums = torch.stack(
                    [sum(sent[member][other] for member in grid.inside(r)) for other in grid.across(r)]
                )
                wanted = sums + owed_across[r]
                arrived = torch.stack([through(each, form) for each in wanted])
                parts.append(arrived[grid.node_of(rank)])
            mean = sum(parts) / world
            for r in range(world):
                sums = torch.stack(
                    [sum(sent[member][other] for member in grid.inside(r)) for other in grid.across(r)]
                )
                wanted = sums + owed_across[r]
                arrived = torch.stack([through(each, form) for each in wanted])
                owed_across[r] = keep(owed_across[r], wanted, arrived)
        # A number between two steps of the codec may go either way.
        assert float(((out - mean).abs() > 1e-5).float().mean()) < 0.01


@pytest.mark.parametrize(("world", "node_size"), [(2, 1), (2, 2), (4, 2)])
def test_loco_equals_its_recursion(world: int, node_size: int) -> None:
    run_ranks(check_loco, world, world, node_size)


def rounded_apart(rank: int) -> None:
    """Ranks that have the same round on their own: the mean may lie between two steps of the format."""
    made = cc.QuantizedCollectives(grads="int8", stochastic=True, min_bytes=0)(dist.group.WORLD)
    full = torch.full((4096,), 38.5 / 127)
    full[::256] = 1.0  # of each block: its scale
    out = torch.empty(2048)
    made.reduce_scatter(full, out, tag=1).wait()
    steps = (out * 127).view(-1, 256)[:, 1:]
    between = (steps - steps.floor() - 0.5).abs() < 0.1
    assert 0.4 < float(between.float().mean()) < 0.6


def test_ranks_round_independently() -> None:
    run_ranks(rounded_apart, 2)
