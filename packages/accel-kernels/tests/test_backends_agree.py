"""Every back end and every instruction set gives the reference's bits: any size, dtype, alignment, thread count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPTIMIZERS = ("adam", "lion", "adagrad", "sgd")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOWS = (None, torch.bfloat16, torch.float16)
Runner = tuple[str, str | None]

SIZES = st.one_of(st.integers(0, 100), st.integers(0, 5000), st.just(1 << 15), st.just((1 << 16) + 3))


@st.composite
def spans(draw: st.DrawFn, numel: int) -> list[tuple[int, int]]:
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=10)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))  # gaps between them stay untouched


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(
    optimizer: str, runner: Runner, problem: Callable[..., Any], assert_same_bits: Any, data: st.DataObject
) -> None:
    numel = data.draw(SIZES)
    case = problem(
        optimizer,
        numel,
        spans=data.draw(spans(numel)),
        grad_dtype=data.draw(st.sampled_from(FLOATS)),
        low_dtype=data.draw(st.sampled_from(LOWS)),
        offset=data.draw(st.integers(0, 17)),
        grad_scale=data.draw(st.sampled_from([1.0, 0.125, 0.3, 0.0])),
        seed=data.draw(st.integers(0, 99)),
    )
    assert_same_bits(case.run(*runner), case.run("reference"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("low_dtype", LOWS)
@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_every_dtype(
    optimizer: str,
    grad_dtype: torch.dtype,
    low_dtype: torch.dtype | None,
    runner: Runner,
    problem: Callable[..., Any],
    assert_same_bits: Any,
) -> None:
    spans = [(0, 1), (1, 40), (41, 41), (43, 700), (700, 1003)]
    case = problem(optimizer, 1010, spans=spans, grad_dtype=grad_dtype, low_dtype=low_dtype, grad_scale=0.7)
    got = case.run(*runner)
    assert_same_bits(got, case.run("reference"))
    assert not torch.equal(got[0], case.param)
    untouched = torch.ones(1010, dtype=torch.bool)
    for start, stop in spans:
        untouched[start:stop] = False
    before = [case.param, case.grad, *case.states, *([] if case.low is None else [case.low])]
    for tensor, original in zip(got, before, strict=True):
        assert torch.equal(tensor[untouched], original[untouched])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_number_of_threads_does_not_matter(
    optimizer: str, runner: Runner, problem: Callable[..., Any], assert_same_bits: Any, run_threads: Any
) -> None:
    numel = 300_007  # large enough to be split
    case = problem(
        optimizer, numel, spans=[(5, 70_001), (70_001, 70_003), (90_000, numel - 1)], low_dtype=torch.bfloat16
    )
    outcomes = []
    for threads in (1, 2, 3, 5):
        with run_threads(threads):
            outcomes.append(case.run(*runner))
    for other in outcomes[1:]:
        assert_same_bits(other, outcomes[0])
    assert_same_bits(outcomes[0], case.run("reference"))


def test_many_small_segments(runner: Runner, problem: Callable[..., Any], assert_same_bits: Any) -> None:
    case = problem("adam", 40_000, spans=[(k, k + 7) for k in range(0, 40_000, 9) if k + 7 <= 40_000][:500])
    assert_same_bits(case.run(*runner), case.run("reference"))


def test_special_values(runner: Runner, problem: Callable[..., Any], assert_same_bits: Any) -> None:
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 3e38, -3e38, float("inf"), -float("inf")])
    for optimizer in OPTIMIZERS:
        case = problem(optimizer, 90, low_dtype=torch.bfloat16)
        case.grad = special.repeat_interleave(10)
        case.states = [torch.zeros(90) for _ in case.states]
        got, expected = case.run(*runner), case.run("reference")
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
        assert_same_bits([t.nan_to_num(nan=1.0) for t in got], [t.nan_to_num(nan=1.0) for t in expected])


def test_degenerate_calls_change_nothing(runner: Runner, problem: Callable[..., Any]) -> None:
    for optimizer in OPTIMIZERS:
        for case in (
            problem(optimizer, 0),
            problem(optimizer, 100, spans=[]),
            problem(optimizer, 9, spans=[(4, 4)]),
        ):
            got = case.run(*runner)
            assert torch.equal(got[0], case.param)


def test_zero_learning_rate_keeps_parameters(runner: Runner) -> None:
    param, grad, m, v = torch.randn(99), torch.randn(99), torch.zeros(99), torch.zeros(99)
    before = param.clone()
    segment = ak.AdamSegment(start=0, stop=99, lr=0.0, weight_decay=0.1, step=1)
    ak.adam_step(param, grad, m, v, [segment], backend=runner[0])
    assert torch.equal(param, before)
    assert m.abs().sum() > 0


@pytest.mark.parametrize("step", [10**6, 10**12])
def test_late_steps_need_no_correction(step: int, runner: Runner) -> None:
    param, grad, m, v = torch.zeros(99), torch.ones(99), torch.ones(99), torch.ones(99)
    segment = ak.AdamSegment(start=0, stop=99, lr=0.1, step=step)
    ak.adam_step(param, grad, m, v, [segment], backend=runner[0])
    torch.testing.assert_close(param, torch.full((99,), -0.1))


def test_sgd_without_momentum_needs_no_buffer(runner: Runner) -> None:
    param, grad = torch.ones(50), torch.ones(50)
    ak.sgd_step(param, grad, None, [ak.SgdSegment(start=0, stop=50, lr=0.5)], backend=runner[0])
    assert torch.equal(param, torch.full((50,), 0.5))


def test_parameters_that_require_gradients(runner: Runner) -> None:
    param = torch.nn.Parameter(torch.ones(50))
    version = param._version
    ak.sgd_step(param, torch.ones(50), None, [ak.SgdSegment(start=0, stop=50, lr=0.5)], backend=runner[0])
    assert torch.equal(param.detach(), torch.full((50,), 0.5))
    assert param._version > version  # autograd notices
    assert param.is_leaf
    assert param.requires_grad


def test_inference_mode(runner: Runner) -> None:
    with torch.inference_mode():
        param, grad = torch.ones(50), torch.ones(50)
        ak.sgd_step(param, grad, None, [ak.SgdSegment(start=0, stop=50, lr=0.5)], backend=runner[0])
        assert torch.equal(param, torch.full((50,), 0.5))


def test_stale_saved_tensor_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.ones(50))
    loss = (weight * weight).sum()
    ak.sgd_step(weight, torch.ones(50), None, [ak.SgdSegment(start=0, stop=50, lr=0.5)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meta_tensors_pass_through() -> None:
    p, g, m, v = (torch.empty(10, device="meta") for _ in range(4))
    ak.adam_step(p, g, m, v, [ak.AdamSegment(start=0, stop=10, lr=0.1, step=1)])


def between_elements(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose address is no multiple of its elements' size."""
    return torch.frombuffer(bytearray(numel * dtype.itemsize + 1), dtype=dtype, offset=1)


def test_tensors_that_lie_between_elements(problem: Any, runner: Any, assert_same_bits: Any) -> None:
    backend, isa = runner
    numel = (8 << 20) // 2 + 77  # beyond what goes past the caches
    made = problem("adam", numel, low_dtype=torch.bfloat16)
    expected = made.run("reference")
    param, grad, *states = (between_elements(numel, torch.float32) for _ in range(4))
    low = between_elements(numel, torch.bfloat16)
    for tensor, value in zip((param, grad, *states), (made.param, made.grad, *made.states), strict=True):
        tensor.copy_(value)
    with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
        ak.adam_step(param, grad, *states, made.segments, low_precision=low, backend=backend)
        assert_same_bits([param, grad, *states, low], expected)
        for dtype in (torch.float32, torch.bfloat16):
            dst = between_elements(numel, dtype)
            ak.cast_copy(param, dst, backend=backend)
            assert torch.equal(dst, param.to(dtype))
        blocks = {"bits": 8, "block_size": 256}
        message = torch.empty(ak.block_bytes(numel, **blocks), dtype=torch.uint8)
        ak.quantize_blocks(param, message, **blocks, backend=backend)
        back, aligned = between_elements(numel, torch.float32), torch.empty(numel)
        ak.dequantize_blocks(message, back, **blocks, backend=backend)
        ak.dequantize_blocks(message, aligned, **blocks, backend=backend)
        assert torch.equal(back, aligned)
