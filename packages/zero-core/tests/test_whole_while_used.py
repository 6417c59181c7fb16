"""Stage 3: a unit is whole as long as something in a forward or a backward needs it, and no longer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zero_core as zero
from torch import nn
from torch.utils.checkpoint import checkpoint
from zero_core.params import Residency
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded

WIDTH = 64


def same_steps(model: nn.Module, plain: nn.Module, num_steps: int = 2) -> float:
    """Train both on the same inputs, which need gradients; the error of parameters and of the inputs' gradients."""
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    error = 0.0
    for step in range(num_steps):
        torch.manual_seed(step)
        x = torch.randn(3, WIDTH)
        grads = []
        for each, optimizer in ((model, opt), (plain, inner)):
            leaf = x.clone().requires_grad_()
            each(leaf).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert leaf.grad is not None
            grads.append({"x": leaf.grad})
        error = max(error, relative_error(*grads))
    return max(error, relative_error(zero.full_state_dict(model), plain.state_dict()))


class _NoWeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class Detached(nn.Module):
    """The weight's last gradient comes before the last use of its values."""

    def __init__(self, function: bool, recompute: str | None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.function, self.recompute = function, recompute

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        first = _NoWeightGradient.apply(x, self.w) if self.function else x @ self.w.detach().t()
        return torch.tanh(first) @ self.w.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute is None:
            return self.compute(x)
        return checkpoint(self.compute, x, use_reentrant=self.recompute == "reentrant")


def detached(rank: int, function: bool, recompute: str | None) -> float:
    start = seeded(lambda: nn.Sequential(Detached(function, recompute), Detached(function, recompute)))
    plain = plain_copy(start)
    return same_steps(zero.shard(start, dp_mesh(2), stage=3), plain)


@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("function", [False, True])
def test_values_are_there_after_the_last_gradient(function: bool, recompute: str | None) -> None:
    assert max(run_ranks(detached, 2, function, recompute)) <= 2e-6


class Watched(nn.Module):
    """Blocks under checkpoints or not; tells how many units are whole when a block's input has its gradient."""

    def __init__(self, recompute: str | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.recompute = recompute

    def forward(self, x: torch.Tensor, look=None) -> torch.Tensor:
        for block in self.blocks:
            if self.recompute is None:
                x = torch.tanh(block(x))
            else:
                x = torch.tanh(checkpoint(block, x, use_reentrant=self.recompute == "reentrant"))
            if look is not None:
                x.register_hook(look)
        return x


def num_whole(rank: int, recompute: str | None, kept: bool) -> int:
    """The most units whole at once in a backward; `kept`: graphs of other forwards are alive."""
    model = zero.shard(seeded(lambda: Watched(recompute)), dp_mesh(2), stage=3)
    units = zero.sharded(model).units
    seen: list[int] = []
    graphs = []

    def look(_: torch.Tensor) -> None:
        seen.append(sum(unit.residency is not Residency.SHARDED for unit in units))

    for _ in range(3):
        if kept:
            graphs.append(model(torch.randn(3, WIDTH, requires_grad=True)).sum())
        loss = model(torch.randn(3, WIDTH, requires_grad=True), look).sum()
        if kept:
            graphs += [loss, model(torch.randn(3, WIDTH, requires_grad=True)).sum()]
        loss.backward()
    assert len(seen) == 18
    return max(seen)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("recompute", [None, "reentrant", "not reentrant"])
def test_few_units_are_whole_at_once_in_backward(recompute: str | None, kept: bool) -> None:
    assert max(run_ranks(num_whole, 2, recompute, kept)) <= 3


class Keeps(nn.Module):
    """Keeps a loss as an attribute: of the first call only, or of every one."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.once = once
        self.aux: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.aux is None or not self.once:
            self.aux = self.inner(x).square().mean()
        return torch.tanh(self.inner(x))


class KeepsInside(nn.Module):
    """A unit around another: what the inner one keeps leads back through both."""

    def __init__(self, once: bool) -> None:
        super().__init__()
        self.before, self.inner = nn.Linear(WIDTH, WIDTH), Keeps(once)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.tanh(self.before(x)))


def kept_tensors(rank: int, once: bool) -> tuple[int, float]:
    start = seeded(lambda: nn.Sequential(KeepsInside(once), KeepsInside(once)))
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(2), stage=3, units=(KeepsInside, Keeps))
    calls = zero.sharded(model).gatherer._calls
    for step in range(5):
        torch.manual_seed(step)
        x = torch.randn(3, WIDTH)
        model(x).sum().backward()
        plain(x).sum().backward()
        if step == 1:
            num_calls = len(calls)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if not once:
        for each in (model, plain):
            each.zero_grad()
            each(x)
            sum(block.inner.aux for block in each).backward()
    opt.step()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    return len(calls) - num_calls, relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("once", [False, True])
def test_what_modules_keep_is_hooked_once(once: bool) -> None:
    for growth, error in run_ranks(kept_tensors, 2, once):
        assert growth <= 0
        assert error <= 2e-6


class UsesOthers(nn.Module):
    """The root and a block compute with weights of units that are not theirs."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(200, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.recompute = recompute

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(x @ self.blocks[2].weight), self.wte.weight, self.wte.weight[:, 0])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        x = torch.tanh(
            x @ (self.wte.weight.t() @ self.wte.weight) / 200
        )  # right after the call that leaves it
        for block in self.blocks:
            x = torch.tanh(block(x))
        return checkpoint(self.tail, x, use_reentrant=False) if self.recompute else self.tail(x)


def used_by_others(rank: int, recompute: bool) -> tuple[list[str], float, int]:
    start = seeded(lambda: UsesOthers(recompute))
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(2), stage=3)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    units = zero.sharded(model).units
    for step in range(4):
        ids = torch.randint(0, 200, (4, 3), generator=torch.Generator().manual_seed(step))
        for each, optimizer in ((model, opt), (plain, inner)):
            loss = each(ids).square().mean()
            if step % 2:
                with torch.no_grad():
                    each(ids)  # whoever stayed whole for the backward does not now
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(zero.ReleasedParameterError, match="belongs into a forward"):
            F.linear(torch.ones(1, WIDTH), model.wte.weight)
    num_whole = sum(unit.residency is not Residency.SHARDED for unit in units)
    names = [unit.name for unit in units]
    return names, relative_error(zero.full_state_dict(model), plain.state_dict()), num_whole


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_may_compute_with_any_parameter(recompute: bool) -> None:
    for names, error, num_whole in run_ranks(used_by_others, 2, recompute):
        assert names == ["wte", "blocks.0", "blocks.1", "blocks.2"]
        assert error <= 5e-6
        assert num_whole == 0
