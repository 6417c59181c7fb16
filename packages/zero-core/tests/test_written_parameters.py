"""What plain torch code does to a sharded model's parameters: replaces them, writes them, steps them too early."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded

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


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.w.clamp_(-0.5, 0.5)
        return x + torch.tanh(self.inner(x @ self.w))


class Writes(nn.Module):
    """Writes its parameters as it computes: rows of an embedding that are too long, and a weight in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, max_norm=1.0)
        self.blocks = nn.ModuleList(Clamped() for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


def written_in_forward(rank: int, world_size: int, stage: int, evaluate: bool) -> tuple[float, float]:
    """The error in training with masters of another dtype, and the largest weight after it, on the same batches."""
    start = seeded(Writes)
    plain = plain_copy(start)
    precision = zero.Precision(param=torch.float32, compute=torch.float32, master=torch.float64)
    model = zero.shard(start, dp_mesh(world_size), stage=stage, precision=precision)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    inner = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        ids = torch.randint(0, 50, (4, 3), generator=torch.Generator().manual_seed(step))
        for each, optimizer in ((model, opt), (plain, inner)):
            if evaluate:
                with torch.inference_mode():
                    each(ids)
            each(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():  # written after the last step, and in no master yet
        model(ids)
        plain(ids)
    largest = zero.get_full(model, "blocks.1.w", optimizer=opt, what="master").abs().max()
    return relative_error(zero.full_state_dict(model), plain.state_dict()), float(largest)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_forward_writes_to_parameters_lasts(stage: int, evaluate: bool) -> None:
    for error, largest in run_ranks(written_in_forward, 2, 2, stage, evaluate):
        assert error <= 2e-6
        assert largest <= 0.5


class TwoParts(nn.Module):
    """Two networks in one unit, with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def stepped_before_backward(rank: int, world_size: int, stage: int, late: bool) -> None:
    overlap = zero.Overlap(publish_late=True) if late else None
    model = zero.shard(seeded(TwoParts), dp_mesh(world_size), stage=stage, overlap=overlap)
    first, second = (
        zero.ShardedOptimizer(model, torch.optim.SGD(part.parameters(), lr=0.1))
        for part in (model.first, model.second)
    )
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    y = model.first(x).sum()
    second.step()
    y.backward()  # through nothing that has moved
    z = model(x).sum()
    first.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    for opt in (first, second):
        opt.zero_grad()
    model(x).sum().backward()  # and it can be used again
    with zero.materialized(model):
        first.step()  # a step is no write
    second.step()


@pytest.mark.parametrize(("stage", "late"), [(0, False), (1, False), (1, True), (2, False), (3, False)])
def test_a_step_between_forward_and_backward_is_noticed_as_in_torch(stage: int, late: bool) -> None:
    run_ranks(stepped_before_backward, 2, 2, stage, late)
