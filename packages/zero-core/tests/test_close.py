"""`close` undoes `shard`: an ordinary model, with the values it had, that may be sharded again."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import SGD
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded

STAGES = [0, 1, 2, 3]
BF16 = zero.Precision(compute=torch.bfloat16)


def step(model: nn.Module, opt, rank: int) -> None:
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    opt.step()
    opt.zero_grad()


def is_plain(model: nn.Module) -> bool:
    return all(
        type(param) is nn.Parameter and param.untyped_storage().nbytes()
        for param in model.parameters()
        if param.numel()
    )


def closed(rank: int, world_size: int, stage: int, precision: zero.Precision | None) -> None:
    model = seeded(Net)
    own = model.generate = lambda: "own"
    model.zero_grad = zeroing = lambda: None
    zero.shard(model, dp_mesh(world_size), stage=stage, precision=precision)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    step(model, opt, rank)
    expected, params = zero.full_state_dict(model), list(model.parameters())
    zero.sharded(model).close()
    assert model.generate is own
    assert model.zero_grad is zeroing
    with pytest.raises(zero.ZeroStateError, match="not part of a sharded model"):
        zero.sharded(model)
    with pytest.raises(zero.ZeroError, match="close"):
        opt.step()

    assert is_plain(model)
    assert all(mine is its for mine, its in zip(params, model.parameters(), strict=True))
    assert relative_error(model.state_dict(), expected) == 0
    again = copy.deepcopy(model)  # an ordinary model in every respect
    plain = SGD(again.parameters(), lr=0.1)
    step(again, plain, 0)
    assert relative_error(again.state_dict(), expected) > 0

    zero.shard(model, dp_mesh(world_size), stage=3 - stage)
    assert relative_error(zero.full_state_dict(model), expected) == 0
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    step(model, opt, 0)
    assert relative_error(zero.full_state_dict(model), again.state_dict()) <= (0.02 if precision else 1e-6)


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_closed_model_is_an_ordinary_one(stage: int, precision: zero.Precision | None) -> None:
    run_ranks(closed, 2, 2, stage, precision)


def closed_too_early(rank: int, world_size: int, stage: int) -> None:
    model = zero.shard(seeded(Net), dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1))
    with zero.materialized(model), pytest.raises(zero.ZeroStateError, match="inside materialized"):
        zero.sharded(model).close()
    step(model, opt, rank)
    zero.sharded(model).close()
    assert is_plain(model)


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_whose_close_was_refused_trains_on(stage: int) -> None:
    run_ranks(closed_too_early, 2, 2, stage)


class Finished:
    def wait(self) -> None: ...


class Coarse(zero.PlainCollectives):
    """Weights to compute with are rounded to eighths."""

    def is_exact(self, nbytes: int, dtype: torch.dtype, *, trainable: bool) -> bool:
        return False

    def gather_weights(self, shard, out, *, tag, version, trainable):
        self.all_gather(shard(), out, tag=tag).wait()
        out.mul_(8).round_().div_(8)
        return Finished()


def closed_where_weights_are_approximate(rank: int, world_size: int, stage: int) -> None:
    start = seeded(Net)
    expected = copy.deepcopy(start.state_dict())
    model = zero.shard(start, dp_mesh(world_size), stage=stage, collectives=Coarse)
    zero.sharded(model).close()
    assert is_plain(model)
    assert relative_error(model.state_dict(), expected) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_closed_model_has_exact_weights(stage: int) -> None:
    run_ranks(closed_where_weights_are_approximate, 2, 2, stage)
