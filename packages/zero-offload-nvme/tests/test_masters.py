"""bf16 and fp16 parameters: an fp32 master is stepped, and the parameter is that master rounded to nearest even."""

from __future__ import annotations

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import PAIRS, give_grads, make_params, train
from torch import nn

CASES = {
    **{name: (ours, options) for name, (ours, _, options) in PAIRS.items()},
    "lion": (off.CPULion, {"lr": 1e-3}),
}


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    shapes=st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_equals_fp32_arithmetic_rounded(
    case: str, dtype: torch.dtype, shapes: list[list[int]], seed: int
) -> None:
    make, options = CASES[case]
    params = make_params(shapes, dtype, seed)
    masters = [nn.Parameter(param.detach().float()) for param in params]
    one, other = make(params, **options), make(masters, **options)
    for step in range(6):
        give_grads(params, seed=seed + step)
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
        one.step()
        other.step()
        for param, master in zip(params, masters, strict=True):
            assert torch.equal(param, master.to(dtype))
            assert torch.equal(one.state[param]["master"], master)


def test_small_updates_add_up_in_the_master() -> None:
    param = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = off.CPULion([param], lr=2.0**-12)
    for _ in range(16):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert (param == 1 - 16 * 2.0**-12).all()  # one update alone would round away


def test_all_dtypes_in_one_optimizer() -> None:
    lists = [make_params([(7, 9), (300,)], dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    together, apart = ([param for one in make for param in one] for make in (lists, _again(lists)))
    train((off.CPUAdamW(together), together), steps=3)
    for params in (apart[:2], apart[2:4], apart[4:]):
        optimizer = off.CPUAdamW(params)
        for step in range(3):
            give_grads(apart, seed=step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def _again(lists: list[list[nn.Parameter]]) -> list[list[nn.Parameter]]:
    return [[nn.Parameter(param.detach().clone()) for param in one] for one in lists]


@pytest.mark.parametrize("to", [torch.float32, torch.float16])
def test_a_model_that_changes_its_dtype_goes_on(to: torch.dtype) -> None:
    model = nn.Linear(5, 6).bfloat16()
    optimizer = off.CPUAdamW(model.parameters(), lr=1e-2)
    train((optimizer, list(model.parameters())), steps=2)
    model.to(to)
    before = [param.detach().clone() for param in model.parameters()]
    train((optimizer, list(model.parameters())), steps=2)
    for param, value in zip(model.parameters(), before, strict=True):
        assert param.dtype == to
        assert not torch.equal(param, value)
        assert ("master" in optimizer.state[param]) == (to != torch.float32)
        assert optimizer.state[param]["step"] == 4
