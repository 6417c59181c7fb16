"""Checkpoints in a sharded model: recomputation finds its units whole, at every stage, wherever the checkpoint is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from checkpoint_models import MATMULS, whatever_their_size
from torch import nn
from zero_core.collectives import PlainCollectives
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import Block, Net, batches, dp_mesh, loss_of, seeded


class Stack(nn.Module):
    """Two units and a layer that drops."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(self.drop(x))
        return x


class Deep(Net):
    def __init__(self) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList(Stack() for _ in range(2))


PLACES = {
    "the units": Block,
    "inside units": nn.Linear,
    "around units": Stack,
    "around units, and the units": (Stack, Block),
}
SETTINGS = {
    "recompute": {},
    "save_ops": {"save_ops": MATMULS},
    "host": {"host": True},
    "contiguous, save_ops": {"contiguous_bytes": 1 << 16, "save_ops": MATMULS},
    "partition": {"partition": True, "verify": True},
    "partition, contiguous": {"partition": True, "contiguous_bytes": 1 << 16},
}


def make_policy(settings: dict) -> zero.CheckpointPolicy:
    if settings.get("partition"):
        settings = {**settings, "partition": dist.group.WORLD}
    return zero.CheckpointPolicy(**whatever_their_size(settings))


def trained(
    rank: int, world_size: int, stage: int, place, settings: dict | None, precision=None
) -> dict[str, torch.Tensor]:
    """Parameters after three steps; every rank has the same batches, so that a partition is possible."""
    start = seeded(Deep)
    if settings is not None and precision is not None:  # before, for a change
        zero.checkpoint_modules(start, place, make_policy(settings))
    model = zero.shard(start, dp_mesh(world_size), stage=stage, units=Block, precision=precision)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if settings is not None and precision is None:
        zero.checkpoint_modules(model, place, make_policy(settings))
    for step, ids in enumerate(batches(0, 3)):
        torch.manual_seed(step)
        loss_of(model, ids).backward()
        units = zero.sharded(model).units
        assert stage < 3 or all(unit.residency is Residency.SHARDED for unit in units)
        opt.step()
        opt.zero_grad()
    return zero.full_state_dict(model)


def equal_everywhere(rank: int, world_size: int, stage: int) -> dict[tuple[str, str], bool]:
    expected = trained(rank, world_size, stage, None, None)
    found = {}
    for place, modules in PLACES.items():
        for name, settings in SETTINGS.items():
            state = trained(rank, world_size, stage, modules, settings)
            found[place, name] = all(torch.equal(state[key], value) for key, value in expected.items())
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_are_equal_to_the_last_bit(stage: int) -> None:
    for found in run_ranks(equal_everywhere, 2, 2, stage):
        assert len(found) == len(PLACES) * len(SETTINGS)
        assert all(found.values()), [key for key, equal in found.items() if not equal]


PRECISIONS = {
    "bf16": zero.Precision(compute=torch.bfloat16),
    "autocast": zero.Precision(param=torch.float32, compute=torch.bfloat16),
}


def equal_in_mixed_precision(rank: int, world_size: int, stage: int, name: str) -> bool:
    expected = trained(rank, world_size, stage, None, None, PRECISIONS[name])
    state = trained(rank, world_size, stage, Block, {"host": True}, PRECISIONS[name])
    return all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 3])
def test_mixed_precision_is_the_same_again(stage: int, name: str) -> None:
    assert all(run_ranks(equal_in_mixed_precision, 2, 2, stage, name))


def gathers_and_forwards(rank: int, world_size: int) -> list[tuple[int, int]]:
    results = []
    gather = PlainCollectives.all_gather
    for place in (None, Block, nn.Linear, Stack):
        model = zero.shard(seeded(Deep), dp_mesh(world_size), stage=3, units=Block)
        handle = zero.checkpoint_modules(model, place) if place else None
        counts: Counter[str] = Counter()

        def counted(self, shard, out, *, tag, counts=counts):
            counts["gathers"] += 1
            return gather(self, shard, out, tag=tag)

        for layer in model.blocks[0].layers:
            layer.up.register_forward_hook(
                lambda *_, counts=counts: counts.update(["forwards"]), always_call=True
            )
        with pytest.MonkeyPatch.context() as patch:
            for step, ids in enumerate(batches(rank, 3)):
                if step == 2:
                    counts.clear()
                    patch.setattr(PlainCollectives, "all_gather", counted)
                loss_of(model, ids).backward()
        results.append((counts["gathers"], counts["forwards"]))
        if handle:
            handle.close()
    return results


def test_recomputation_gathers_nothing_twice() -> None:
    for (plain, forwards), units, inside, around in run_ranks(gathers_and_forwards, 2, 2):
        assert forwards == 2
        assert units == (plain, 2 * forwards)
        assert inside == (plain, forwards), "hooks of a checkpointed module itself run once"
        assert around[1] == 2 * forwards
        assert around[0] <= plain + 1, "the last unit may have been kept from forward to backward without it"


def first_whole_then_sharded(rank: int, world_size: int) -> bool:
    """Forward finds the units whole and gathers nothing; the recomputation has to."""
    results = []
    for settings in (None, {}, {"save_ops": MATMULS}):
        model = zero.shard(seeded(Deep), dp_mesh(world_size), stage=3, units=Block)
        if settings is not None:
            zero.checkpoint_modules(model, Stack, zero.CheckpointPolicy(**settings))
        opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step, ids in enumerate(batches(rank, 2)):
            torch.manual_seed(step)
            with zero.materialized(model):
                loss = loss_of(model, ids)
            loss.backward()
            opt.step()
            opt.zero_grad()
        results.append(zero.full_state_dict(model))
    first, *others = results
    return all(torch.equal(other[key], value) for other in others for key, value in first.items())


def test_a_forward_on_whole_units() -> None:
    assert all(run_ranks(first_whole_then_sharded, 2, 2))


class MidwayError(Exception):
    pass


def interrupted(rank: int, world_size: int, place) -> bool:
    expected = trained(rank, world_size, 3, None, None)
    model = zero.shard(seeded(Deep), dp_mesh(world_size), stage=3, units=Block)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    zero.checkpoint_modules(model, place, zero.CheckpointPolicy(min_bytes=1, contiguous_bytes=1 << 15))
    runs, fail_at = [0], [0]

    def press(*_):
        runs[0] += 1
        if runs[0] == fail_at[0]:
            raise MidwayError

    model.blocks[1].layers[0].down.register_forward_pre_hook(press)
    for step, ids in enumerate(batches(0, 3)):
        for when in (1, 2):  # in forward, in the recomputation
            runs[0], fail_at[0] = 0, when
            with pytest.raises(MidwayError):
                loss_of(model, ids).backward()
            fail_at[0] = 0
            opt.zero_grad()
        torch.manual_seed(step)
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
    return all(torch.equal(zero.full_state_dict(model)[key], value) for key, value in expected.items())


@pytest.mark.parametrize("place", [Block, Stack])
def test_an_interrupted_recomputation_leaves_a_usable_model(place) -> None:
    assert all(run_ranks(interrupted, 2, 2, place))
