"""What stays whole at stage 3: the same bits, fewer gathers, and exactly that much more memory."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import Net, Untied, batches, dp_mesh, loss_of, relative_error, seeded

PLACEMENTS = {
    "nothing": None,
    "small": zero.Placement(whole_bytes=8000),
    "embeddings": zero.Placement(whole_modules=nn.Embedding),
    "everything": zero.Placement(whole_bytes=1 << 30),
    "both": zero.Placement(whole_modules=lambda name, module: name == "blocks.1", whole_bytes=4000),
}


def train(rank: int, world_size: int, name: str, dtype: torch.dtype, accumulate: int):
    precision = zero.Precision(compute=dtype)
    model = zero.shard(
        seeded(Untied), dp_mesh(world_size), stage=3, placement=PLACEMENTS[name], precision=precision
    )
    opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    zero.diagnostics(model)
    for step, ids in enumerate(batches(rank, 4 * accumulate)):
        loss_of(model, ids).backward()
        if step % accumulate == accumulate - 1:
            zero.clip_grad_norm(opt, 0.5)
            opt.step()
            opt.zero_grad()
    units = zero.sharded(model).units
    whole = [unit.name for unit in units if unit.residency is Residency.GATHERED]
    resident = sum(unit.full.untyped_storage().nbytes() for unit in units)
    expected = sum(unit.full_bytes for unit in units if unit.name in whole)
    assert resident == expected
    gathered = zero.diagnostics(model)["gathered_bytes"]
    with zero.materialized(model):
        norms = [float(param.detach().double().norm()) for param in model.parameters()]
    assert all(norm == norm for norm in norms)
    return zero.full_state_dict(model), whole, gathered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_same_bits_whatever_stays_whole(dtype: torch.dtype, accumulate: int) -> None:
    results = {name: run_ranks(train, 2, 2, name, dtype, accumulate)[0] for name in PLACEMENTS}
    state, whole, gathered = results["nothing"]
    assert whole == []
    for name, (other, kept, received) in results.items():
        assert relative_error(other, state) == 0.0, name
        if name != "nothing":
            assert kept
            assert received < gathered
    assert results["embeddings"][1] == ["embed"]
    assert len(results["everything"][1]) >= 4


def with_values(rank: int) -> float:
    """A parameter that stays whole is an ordinary one."""
    model = zero.shard(
        seeded(Untied), dp_mesh(2), stage=3, placement=zero.Placement(whole_modules=nn.Embedding)
    )
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.embed.weight.detach().clone()
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    with torch.no_grad():
        model.embed.weight[0] = 5.0
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    assert float(model.embed.weight[0, 0]) > 4
    return float((model.embed.weight - before).abs().max())


def test_what_stays_whole_may_be_read_and_edited() -> None:
    first, second = run_ranks(with_values, 2)
    assert first == second
    assert first > 0


@pytest.mark.parametrize(
    ("stage", "placement", "message"),
    [
        (2, zero.Placement(whole_bytes=10), "at stage 2 everything stays whole"),
        (
            3,
            zero.Placement(whole_modules=nn.Conv2d),
            r"Placement\(whole_modules=...\): no module matches Conv2d",
        ),
    ],
)
def test_a_placement_that_cannot_be_honoured_is_refused(stage: int, placement, message: str) -> None:
    run_ranks(refused, 1, stage, placement, message)


def refused(rank: int, stage: int, placement, message: str) -> None:
    with pytest.raises(zero.ZeroConfigError, match=message):
        zero.shard(seeded(Net), dp_mesh(1), stage=stage, placement=placement)


def test_sizes_are_checked() -> None:
    with pytest.raises(
        zero.ZeroConfigError, match=r"Placement\(whole_bytes=...\): expected a number of bytes"
    ):
        zero.Placement(whole_bytes=-1)


def reload(rank: int, world_size: int) -> None:
    """What stays whole is loaded like everything else."""
    placement = zero.Placement(whole_bytes=8000)
    model = zero.shard(seeded(Untied), dp_mesh(world_size), stage=3, placement=placement)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    first, second = batches(rank, 2)
    states = []
    for ids in (first, second):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
        states.append(
            (
                zero.full_state_dict(model),
                {n: s.local.clone() for n, s in zero.sharded_state(model, opt).items()},
            )
        )
    zero.load_sharded_state(model, opt, states[0][1])
    assert relative_error(zero.full_state_dict(model), states[0][0]) == 0.0
    loss_of(model, second).backward()
    opt.step()
    assert relative_error(zero.full_state_dict(model), states[1][0]) <= 1e-6
    name = "head.weight"
    zero.set_full(model, name, torch.full_like(zero.get_full(model, name), 0.5))
    assert bool((zero.get_full(model, name) == 0.5).all())
    assert bool(loss_of(model, second).isfinite())


def test_a_state_is_loaded_into_what_stays_whole() -> None:
    run_ranks(reload, 2, 2)
