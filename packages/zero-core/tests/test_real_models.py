"""Models of the `transformers` library, unmodified and without a word from the user, train as under plain averaging."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from torch import nn
from transformers_models import FAMILIES, batch_of, require_transformers
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, seeded

require_transformers()


def averaged_step(
    plain: nn.Module, inner: torch.optim.Optimizer, family: str, world_size: int, step: int
) -> None:
    """What DDP with find_unused_parameters does: the mean over ranks, no gradient counting as zero."""
    for rank in range(world_size):
        (plain(**batch_of(family, rank, step)).loss / world_size).backward()
    inner.step()
    inner.zero_grad()


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to values beyond 0.01: the bias of a key has no gradient but rounding."""
    return max(float(((found[n] - want).abs() / (want.abs() + 0.01)).max()) for n, want in expected.items())


def train(
    rank: int, world_size: int, family: str, stage: int, in_shards: bool
) -> tuple[float, list[str], int]:
    mesh = dp_mesh(world_size)
    build = FAMILIES[family].build
    plain = seeded(build)
    torch.manual_seed(0)
    if in_shards:
        with zero.sharded_init(mesh, stage=stage):
            model = build()
    else:
        model = copy.deepcopy(plain)
    assert model.num_parameters() == plain.num_parameters()
    model = zero.shard(model, mesh, stage=stage)
    assert model.num_parameters() == plain.num_parameters()
    # Not Adam: the gradient of a key's bias is zero but for rounding, and Adam would make that a whole step.
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        model(**batch_of(family, rank, step)).loss.backward()
        opt.step()
        opt.zero_grad()
        averaged_step(plain, inner, family, world_size, step)
    found = zero.full_state_dict(model)
    expected = plain.state_dict()
    return apart(found, expected), sorted(set(found) ^ set(expected)), len(zero.sharded(model).units)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", [2, 3])
def test_trains_as_under_ddp(family: str, stage: int) -> None:
    for error, keys, num_units in run_ranks(train, 2, 2, family, stage, stage == 3, timeout_s=180):
        assert error <= 2e-5
        assert keys == []
        assert num_units >= 3, "the blocks were not found"
