"""What plain torch code does to a sharded model's parameters: replaces them, writes them, steps them too early."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, seeded

STAGES = [0, 1, 2, 3]


def stack() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))


def replaced_parameters(rank: int, world_size: int, stage: int) -> None:
    model = zero.shard(seeded(stack), dp_mesh(world_size), stage=stage)
    x = torch.ones(1, 64)
    before = model[1].weight
    model[1].weight = nn.Parameter(torch.ones(64, 64))
    with pytest.raises(zero.ZeroStateError, match=r"'1\.weight' was replaced .* before shard"):
        model(x)
    model[1].weight = before
    model(x).sum().backward()
    values = {name: torch.ones(64, 64) for name, _ in model.named_parameters()}
    torch.func.functional_call(model, values, x)  # says itself what to compute with
    model.load_state_dict(values, assign=True)
    with pytest.raises(zero.ZeroStateError, match=r"'0\.weight' was replaced .*load_full_state_dict"):
        model(x)


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_was_replaced_is_named(stage: int) -> None:
    run_ranks(replaced_parameters, 2, 2, stage)
