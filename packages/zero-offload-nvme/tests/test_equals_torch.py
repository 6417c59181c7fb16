"""In fp32 every optimizer does what torch's own does, over many steps, within a stated number of units."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import PAIRS, copies_of, give_grads, make_params, train
from torch import Tensor, nn


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", PAIRS)
def test_many_steps(case: str, fused: bool) -> None:
    ours, theirs, options = PAIRS[case]
    params = make_params()
    before, others = copies_of(params), copies_of(params)
    one, other = ours(params, **options), theirs(others, fused=fused, **options)
    train((one, params), (other, others), steps=50)
    for param, expected, start in zip(params, others, before, strict=True):
        torch.testing.assert_close(param, expected, rtol=2e-6, atol=2e-6)
        assert not param.numel() or not torch.equal(param, start)
        assert one.state[param]["step"] == other.state[expected]["step"] == 50


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    steps=st.integers(1, 30),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    seed=st.integers(0, 10_000),
    case=st.sampled_from(["adamw", "adamw, no decay", "adam", "adam, decoupled", "adagrad"]),
)
def test_one_step_is_within_the_stated_units(
    shape: list[int], steps: int, spread: float, seed: int, case: str
) -> None:
    """In units of the larger of what is added up: moments within 3, parameters within 16 (Adagrad: 8)."""
    ours, theirs, options = PAIRS[case]
    params = make_params([shape], seed=seed)
    others = copies_of(params)
    one, other = ours(params, **options), theirs(others, fused=True, **options)
    train((other, others), steps=steps, seed=seed)
    one.load_state_dict(copy.deepcopy(other.state_dict()))
    (param,), (expected,) = params, others
    param.data.copy_(expected)
    give_grads(params, others, seed=seed + 1)
    assert param.grad is not None
    assert expected.grad is not None
    exponents = torch.empty(shape).uniform_(-spread, spread, generator=torch.Generator().manual_seed(seed))
    for grad in (param.grad, expected.grad):
        grad *= 10**exponents
    old, before = expected.detach().clone(), {k: v.clone() for k, v in other.state[expected].items()}
    one.step()
    other.step()
    mine, its, grad = one.state[param], other.state[expected], expected.grad
    lr, limit = one.param_groups[0]["lr"], 8 if "adagrad" in case else 16
    if "adagrad" in case:
        assert units(mine["sum"], its["sum"], its["sum"]) <= 3
        update = lr * grad / (its["sum"].sqrt() + 1e-10)
    else:
        beta1, beta2 = one.param_groups[0]["betas"]
        term = torch.maximum(beta1 * before["exp_avg"].abs(), (1 - beta1) * grad.abs())
        assert units(mine["exp_avg"], its["exp_avg"], term) <= 3
        assert units(mine["exp_avg_sq"], its["exp_avg_sq"], its["exp_avg_sq"]) <= 3
        count = steps + 1
        root = (its["exp_avg_sq"] / (1 - beta2**count)).sqrt() + one.param_groups[0]["eps"]
        update = lr / (1 - beta1**count) * term / root
    assert units(param.detach(), expected.detach(), torch.maximum(old.abs(), update.abs())) <= limit


def units(got: Tensor, expected: Tensor, size: Tensor) -> float:
    """The largest difference, in units in the last place of numbers of this size."""
    spacing = torch.nextafter(size.abs(), torch.full_like(size, torch.inf)) - size.abs()
    return float(((got - expected).abs() / spacing).max()) if got.numel() else 0.0


def test_lion_is_the_lion_of_its_paper() -> None:
    params = make_params()
    optimizer = off.CPULion(params, lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    expected = [param.detach().clone() for param in params]
    averages = [torch.zeros_like(param) for param in params]
    for step in range(5):
        give_grads(params, seed=step)
        for param, value, average in zip(params, expected, averages, strict=True):
            assert param.grad is not None
            update = (0.9 * average + 0.1 * param.grad).sign() + 0.2 * value
            value -= 0.1 * update
            average.mul_(0.99).add_(param.grad, alpha=0.01)
        optimizer.step()
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-5, atol=1e-5)


def test_same_bits_as_one_flat_buffer() -> None:
    """What a sharded engine's fused step does to a flat buffer of the same values."""
    import accel_kernels as ak

    params = make_params()
    optimizer = off.CPUAdamW(params, lr=1e-2, weight_decay=0.1)
    flat = torch.cat([param.detach().flatten() for param in params])
    moments = [torch.zeros_like(flat) for _ in range(2)]
    for step in range(1, 6):
        give_grads(params, seed=step)
        grads = [param.grad for param in params if param.grad is not None]
        flat_grad = torch.cat([grad.flatten() for grad in grads])
        segment = ak.AdamSegment(start=0, stop=flat.numel(), lr=1e-2, weight_decay=0.1, step=step)
        ak.adam_step(flat, flat_grad, *moments, [segment])
        optimizer.step()
    assert torch.equal(torch.cat([param.detach().flatten() for param in params]), flat)


def test_same_bits_as_a_sharded_engine() -> None:
    pytest.importorskip("zero_core")
    from zero_core.testing import run_ranks

    run_ranks(_beside_an_engine, 1)


def _beside_an_engine(rank: int) -> None:
    import torch.distributed as dist
    import zero_core as zero

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))

    plain, sharded = model(), zero.shard(model(), dist.group.WORLD, stage=1)
    ours = off.CPUAdamW(plain.parameters(), lr=1e-2)
    engine = zero.ShardedOptimizer(sharded, torch.optim.AdamW(sharded.parameters(), lr=1e-2))
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(8, 20)
        for each, optimizer in ((plain, ours), (sharded, engine)):
            each(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    full = zero.full_state_dict(sharded)
    assert all(torch.equal(full[name], value) for name, value in plain.state_dict().items())
