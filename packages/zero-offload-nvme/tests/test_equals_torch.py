"""In fp32 every optimizer does what torch's own does, over many steps, within a stated number of units."""

from __future__ import annotations

import pytest
import torch
import zero_offload_nvme as off
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import PAIRS, copies_of, give_grads, make_params, train, ulps
from torch import nn

STATES = {"exp_avg": 2, "exp_avg_sq": 2, "sum": 2}


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
    steps=st.integers(0, 30),
    scale=st.sampled_from([1e-4, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
    case=st.sampled_from([name for name in PAIRS if name != "adam, L2"]),
)
def test_one_step_is_within_the_stated_units(
    shape: list[int], steps: int, scale: float, seed: int, case: str
) -> None:
    """From equal states: moments within 2 units, an update within 8 of its own."""
    ours, theirs, options = PAIRS[case]
    params = make_params([shape], seed=seed)
    others = copies_of(params)
    one, other = ours(params, **options), theirs(others, fused=True, **options)
    train((other, others), steps=steps, seed=seed)
    one.load_state_dict(other.state_dict())
    for tensor in one.state.values():  # states of their own
        tensor.update({key: value.clone() for key, value in tensor.items()})
    # From zero a parameter becomes its update, which shows all of its bits.
    for param in (*params, *others):
        param.data.zero_()
    give_grads(params, others, seed=seed + 1)
    for param in (*params, *others):
        assert param.grad is not None
        param.grad *= scale
    one.step()
    other.step()
    (param,), (expected,) = params, others
    for name, limit in STATES.items():
        if name in one.state[param]:
            assert ulps(one.state[param][name], other.state[expected][name]) <= limit
    if not options.get("weight_decay") or "adagrad" not in case:
        assert ulps(param, expected) <= 8


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
    zero = pytest.importorskip("zero_core")
    from zero_core.testing import run_ranks

    run_ranks(_beside_an_engine, 1, args=())
    del zero


def _beside_an_engine(rank: int, world_size: int) -> None:
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
