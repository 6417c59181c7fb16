"""The CUDA kernels give the reference's bits, on torch's current stream, without waiting for the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed"),
]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("optimizer", ["adam", "lion", "adagrad", "sgd"])
@pytest.mark.parametrize("low_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_steps(
    optimizer: str,
    grad_dtype: torch.dtype,
    low_dtype: torch.dtype | None,
    offset: int,
    problem: Callable[..., Any],
    assert_same_bits: Any,
) -> None:
    spans = [(0, 1), (2, 5), (7, 1003), (1003, 1003), (1010, 600_001)]
    case = problem(
        optimizer,
        600_002,
        spans=spans,
        grad_dtype=grad_dtype,
        low_dtype=low_dtype,
        offset=offset,
        grad_scale=0.3,
    )
    assert_same_bits(case.run("cuda", device="cuda"), case.run("reference"))


def test_is_the_default() -> None:
    assert ak.report()["adam_step"]["cuda"].backend == "cuda"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [0, 1, 5, 1023, 1_000_003])
def test_norm(dtype: torch.dtype, numel: int) -> None:
    grad = torch.randn(numel + 1, device="cuda").to(dtype)[1:]
    got = ak.grad_norm_scale([grad, grad], scale=0.5)
    torch.testing.assert_close(got, ak.reference.grad_norm_scale([grad, grad], scale=0.5), rtol=1e-12, atol=0)
    assert torch.equal(got, ak.grad_norm_scale([grad, grad], scale=0.5))
    if numel:
        grad[numel // 2] = float("inf")
        assert ak.grad_norm_scale(grad)[1] == 1


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dst_dtype", FLOATS)
@pytest.mark.parametrize("src_dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1])
def test_cast(src_dtype: torch.dtype, dst_dtype: torch.dtype, stochastic: bool, offset: int) -> None:
    patterns = torch.randint(-(1 << 31), (1 << 31) - 1, (100_003,)).to(torch.int32).view(torch.float32)
    src = torch.cat([patterns, torch.randn(100_000)]).to(src_dtype)
    expected = torch.empty_like(src, dtype=dst_dtype)
    ak.cast_copy(src, expected, scale=1.5, stochastic=stochastic, seed=3, backend="reference")
    moved = torch.cat([torch.zeros(offset, dtype=src_dtype), src]).cuda()[offset:]
    got = torch.empty(src.numel() + offset, dtype=dst_dtype, device="cuda")[offset:]
    ak.cast_copy(moved, got, scale=1.5, stochastic=stochastic, seed=3)
    host = got.cpu()
    assert torch.equal(host.isnan(), expected.isnan())
    assert torch.equal(host.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


def test_scale_on_the_device_and_no_synchronisation() -> None:
    n = 10_000
    p, g, m, v = tensors = [torch.rand(n, device="cuda") for _ in range(4)]
    p2, g2, m2, v2 = others = [t.clone() for t in tensors]
    segments = [ak.AdamSegment(start=0, stop=n, lr=0.1, step=2)]
    factor = torch.tensor(0.25, device="cuda")
    ak.adam_step(p, g, m, v, segments, grad_scale=factor)  # compiles
    ak.adam_step(p2, g2, m2, v2, segments, grad_scale=0.25)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ak.adam_step(p, g, m, v, segments, grad_scale=factor)
        ak.grad_norm_scale(tensors[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream() -> None:
    n = 1 << 22
    src, dst = torch.zeros(n, device="cuda"), torch.empty(n, device="cuda", dtype=torch.bfloat16)
    ak.cast_copy(src, dst)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        src.fill_(3.0)
        ak.cast_copy(src, dst)
    stream.synchronize()
    assert (dst == 3).all()


def test_clip_factor_from_the_norm_stays_on_the_device() -> None:
    n = 4096
    grad = torch.randn(n, device="cuda")
    total = ak.grad_norm_scale(grad)
    factor = (1.0 / (total[0].sqrt() + 1e-6)).clamp(max=1.0)
    param = torch.zeros(n, device="cuda")
    ak.sgd_step(param, grad, None, [ak.SgdSegment(start=0, stop=n, lr=1.0)], grad_scale=factor)
    torch.testing.assert_close(param.norm(), torch.tensor(1.0, device="cuda"), rtol=1e-5, atol=1e-5)
