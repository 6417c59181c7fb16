"""Parameters of several dtypes in one model: each is trained in its own precision, none in a narrower one."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from torch import nn
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
STEPS = 4


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8).to(dtype) for dtype in DTYPES)
        self.whole = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Side by side: the rounding of one block's dtype does not reach another's gradients.
        outputs = [torch.tanh(block(x.to(block.weight.dtype))).double() for block in self.blocks]
        return sum(out.square().mean() for out in outputs) * self.whole[1]


def train(rank: int, world_size: int, stage: int) -> tuple[list[float], list[float]]:
    start = seeded(Mixed)
    plain = plain_copy(start)
    model = zero.shard(start, dp_mesh(world_size), stage=stage)
    opt = zero.ShardedOptimizer(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    )
    inner = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
    norms = []
    for step in range(STEPS):
        torch.manual_seed(step)
        x = torch.randn(world_size, 4, 8, dtype=torch.float64)
        model(x[rank]).backward()
        for part in x:
            (plain(part) / world_size).backward()
        expected = torch.stack(
            [p.grad.double().norm() for p in plain.parameters() if p.grad is not None]
        ).norm()
        norms.append(abs(float(zero.grad_norm(opt) / expected) - 1))
        opt.step()
        opt.zero_grad()
        inner.step()
        inner.zero_grad()
    found, expected = zero.full_state_dict(model), plain.state_dict()
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
    first = seeded(Mixed).state_dict()
    errors = []
    for index in range(len(DTYPES)):
        names = [name for name in found if name.startswith(f"blocks.{index}.")]
        moved = relative_error({n: found[n] for n in names}, {n: first[n] for n in names})
        assert moved > 1e-3, "the steps changed nothing: the comparison would be empty"
        errors.append(relative_error({n: found[n] for n in names}, {n: expected[n] for n in names}))
    return errors, norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_dtype_keeps_its_precision(stage: int) -> None:
    for errors, norms in run_ranks(train, 2, 2, stage):
        for dtype, error in zip(DTYPES, errors, strict=True):
            # A bf16 parameter has an fp32 master here and none in plain torch: a rounding apart at every step.
            assert error <= STEPS * torch.finfo(dtype).eps, (dtype, error)
        assert norms[0] <= 1e-6
        assert max(norms) <= 1e-2
