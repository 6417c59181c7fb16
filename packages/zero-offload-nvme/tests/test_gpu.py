"""Parameters on a CUDA device, masters and states on the host: the bits of the same optimizer on the CPU."""

from __future__ import annotations

import pytest
import torch
import zero_offload_nvme as off
from offload_models import PAIRS, copies_of, give_grads, make_params
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CASES = {
    **{name: (ours, options) for name, (ours, _, options) in PAIRS.items()},
    "lion": (off.CPULion, {"lr": 1e-3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_on_the_cpu(case: str, dtype: torch.dtype) -> None:
    make, options = CASES[case]
    shapes = [(3,), (), (0,), (5_000_001,), (1000, 9000), (33, 5)]
    host = [*make_params(shapes, dtype), nn.Parameter(torch.randn(9, 40).to(dtype).t())]
    device = [nn.Parameter(param.detach().cuda()) for param in copies_of(host)]
    one, other = make(device, **options), make(host, **options)
    for step in range(4):
        give_grads(host, device, seed=step)
        one.step()
        other.step()
    for param, expected in zip(device, host, strict=True):
        assert torch.equal(param.cpu(), expected)
        assert all(not value.is_cuda for value in one.state[param].values())


def test_work_queued_after_a_step_sees_it() -> None:
    param = nn.Parameter(torch.ones(1 << 24, device="cuda"))
    optimizer = off.CPULion([param], lr=1.0)
    for expected in (0.0, -1.0, -2.0):
        torch.cuda._sleep(50_000_000)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.detach().sum().item() == expected * param.numel()


def test_parameters_on_both_sides_and_a_resumed_run() -> None:
    params = make_params([(100,), (50, 4)], torch.bfloat16)
    params[1] = nn.Parameter(params[1].detach().cuda())
    others = copies_of(params)
    one, other = off.CPUAdamW(params), off.CPUAdamW(others)
    for step in range(3):
        give_grads(params, others, seed=step)
        one.step()
        other.step()
    fresh = off.CPUAdamW(others)
    fresh.load_state_dict(other.state_dict())
    for step in range(3):
        give_grads(params, others, seed=step)
        one.step()
        fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert fresh.state[others[1]]["master"].is_pinned()
