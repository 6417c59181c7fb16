"""`zero_grad` of the model, of any of its modules and of wrappers forgets the gradients that they hold."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from torch import nn
from torch.optim import SGD
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, relative_error


class Counting(nn.Linear):
    """It has a `zero_grad` of its own."""

    zeroed = 0

    def zero_grad(self) -> None:
        super().zero_grad()
        self.zeroed += 1


def zeroed_by_parts(rank: int, world_size: int, stage: int) -> float:
    """Layers are zeroed one by one; what they hold is forgotten, and nothing else is."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Counting(8, 8), nn.Linear(8, 8)))
    model = zero.shard(copy.deepcopy(plain), dp_mesh(world_size), stage=stage)
    opt, inner = (
        zero.ShardedOptimizer(model, SGD(model.parameters(), lr=0.1)),
        SGD(plain.parameters(), lr=0.1),
    )
    x = torch.ones(2, 8)
    for step in range(4):
        for net in (model, plain):
            net(x).square().mean().backward()
        if step == 0:
            model[0].zero_grad()
            with pytest.raises(zero.ZeroStateError, match="there is no gradient"):
                zero.get_full(model, "0.weight", what="grad")
            assert (
                relative_error(
                    {"weight": zero.get_full(model, "1.1.weight", what="grad")},
                    {"weight": plain[1][1].weight.grad},
                )
                <= 1e-6
            )
            plain[0].zero_grad()
        for optimizer in (opt, inner):
            optimizer.step()
        for net in (model, plain):
            net[0].zero_grad(set_to_none=step % 2 == 0)
            net[1].zero_grad(step % 2 == 0)
            net[1][0].zero_grad()
    assert model[1][0].zeroed == plain[1][0].zeroed > 0
    error = relative_error(zero.full_state_dict(model), plain.state_dict())
    zero.sharded(model).close()
    assert all("zero_grad" not in module.__dict__ for module in model.modules())
    return error


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_submodule_forgets_its_gradients(stage: int) -> None:
    assert max(run_ranks(zeroed_by_parts, 2, 2, stage)) <= 1e-6


class Wrapper(nn.Module):
    """Around a model, with a parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * self.inner(x)


def zeroed_by_a_wrapper(rank: int, world_size: int) -> None:
    wrapper = Wrapper(
        zero.shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), dp_mesh(world_size), stage=2)
    )
    state = zero.sharded(wrapper)
    wrapper(torch.ones(2, 8)).square().mean().backward()
    wrapper.zero_grad()
    assert wrapper.gain.grad is None
    with pytest.raises(zero.ZeroStateError, match="there is no gradient"):
        zero.get_full(wrapper, "0.weight", what="grad")
    state.close()
    assert "zero_grad" not in wrapper.__dict__


def test_a_wrapper_forgets_its_own_gradients_too() -> None:
    run_ranks(zeroed_by_a_wrapper, 2, 2)
