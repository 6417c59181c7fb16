"""grad_norm_scale: fp64 sum of squares and overflow count, the same bits for any instruction set and thread count."""

from __future__ import annotations

from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Runner = tuple[str, str | None]


def run(runner: Runner, grads: Any, **options: Any) -> torch.Tensor:
    backend, isa = runner
    if isa is None:
        return ak.grad_norm_scale(grads, backend=backend, **options)
    with ak.set_cpu_isa(isa):
        return ak.grad_norm_scale(grads, backend=backend, **options)


@settings(max_examples=25, deadline=None)
@given(
    numel=st.one_of(st.integers(0, 300), st.integers(0, 200_000)),
    offset=st.integers(0, 17),
    dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1.0, 0.25, -3.0, 1e-30]),
    num_bad=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_against_reference(
    runner: Runner, numel: int, offset: int, dtype: torch.dtype, scale: float, num_bad: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(numel + offset, generator=generator).to(dtype)[offset:]
    got = run(runner, grad, scale=scale)
    expected = ak.reference.grad_norm_scale(grad, scale=scale)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert got.dtype == torch.float64
    if numel > 0:
        for k in range(num_bad):
            grad[(k * 7919) % numel] = (float("inf"), float("nan"), -float("inf"))[k % 3]
        assert run(runner, grad)[1] == (~grad.isfinite()).sum()
        assert num_bad == 0 or not run(runner, grad)[0].isfinite()


def test_values_too_large_for_fp32_squares(runner: Runner) -> None:
    total, bad = run(runner, torch.full((1000,), 1e30)).tolist()
    assert total == pytest.approx(1e63, rel=1e-6)
    assert bad == 0


def test_sequence_and_accumulation(runner: Runner) -> None:
    grads = [torch.randn(1001), torch.randn(0), torch.randn(5).bfloat16()]
    out = torch.tensor([10.0, 2.0], dtype=torch.float64)
    returned = run(runner, grads, scale=2.0, out=out)
    assert returned is out
    expected = torch.stack([4 * g.double().square().sum() for g in grads]).sum()
    torch.testing.assert_close(out, torch.stack([10 + expected, torch.tensor(2.0, dtype=torch.float64)]))


def test_nothing_to_sum(runner: Runner) -> None:
    assert run(runner, []).tolist() == [0.0, 0.0]
    assert run(runner, torch.zeros(0)).tolist() == [0.0, 0.0]


def test_same_bits_for_any_isa_and_thread_count(run_threads: Any) -> None:
    grad = torch.randn(1_000_003)
    outcomes = []
    for isa in ak.available_cpu_isas():
        for threads in (1, 2, 3):
            with run_threads(threads):
                outcomes.append(run(("cpu", isa), grad).tolist())
    assert all(outcome == outcomes[0] for outcome in outcomes)
