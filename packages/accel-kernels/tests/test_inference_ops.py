"""Every back end of the inference ops gives the reference's result to rounding: shapes, dtypes, strides, odd sizes."""

from __future__ import annotations

import contextlib
from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_lab import FLOATS, Way, agree, ways, with_way

Tensor = torch.Tensor


def strided(generator: torch.Generator, rows: int, columns: int, dtype: torch.dtype, gap: int) -> Tensor:
    """A matrix whose rows lie ``gap`` elements apart, at an address that is no multiple of anything."""
    return torch.randn(rows, columns + gap, generator=generator).to(dtype)[:, gap // 2 : gap // 2 + columns]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int]:
    rows = draw(st.one_of(st.integers(0, 20), st.sampled_from([33, 81, 100, 170])))
    columns = draw(st.one_of(st.integers(0, 40), st.sampled_from([64, 127, 200])))
    return rows, columns, draw(st.one_of(st.integers(1, 80), st.sampled_from([128, 257, 512])))


@pytest.mark.parametrize("way", ways())
@settings(max_examples=40, deadline=None)
@given(
    size=sizes(),
    dtype=st.sampled_from(FLOATS),
    bias=st.booleans(),
    gap=st.sampled_from([0, 3, 8]),
    seed=st.integers(0, 99),
)
def test_linear(
    way: Way, size: tuple[int, int, int], dtype: torch.dtype, bias: bool, gap: int, seed: int
) -> None:
    m, n, k = size
    generator = torch.Generator().manual_seed(seed)
    x = strided(generator, m, k, dtype, gap)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    quantized, scale = ak.quantize_int8(weight)
    with with_way(way, dtype) as backend:
        got = ak.linear(x, weight, b, backend=backend)
        agree(got, ak.reference.linear(x, weight, b), k, at_least=k**0.5)
        got = ak.linear_int8(x, quantized, scale, b, backend=backend)
    agree(got, ak.reference.linear_int8(x, quantized, scale, b), k, at_least=k**0.5)
    assert got.shape == (m, n)
    assert got.dtype == dtype


@pytest.mark.parametrize("way", ways())
@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([0, 1, 2, 5, 6, 17, 90]),
    n=st.one_of(st.integers(0, 40), st.just(100)),
    group_size=st.sampled_from([32, 64, 96, 128, 256, 320]),
    groups=st.integers(1, 5),
    dtype=st.sampled_from(FLOATS),
    zero=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_int4(
    way: Way, m: int, n: int, group_size: int, groups: int, dtype: torch.dtype, zero: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = group_size * groups
    x = strided(generator, m, k, dtype, 5)
    packed, scale, zeros = ak.quantize_int4(torch.randn(n, k, generator=generator), group_size)
    arguments = (x, packed, scale, zeros if zero else None, None)
    with with_way(way, dtype) as backend:
        got = ak.linear_int4(*arguments, group_size=group_size, backend=backend)
    agree(got, ak.reference.linear_int4(*arguments, group_size=group_size), k, at_least=k**0.5)


@pytest.mark.parametrize("way", ways())
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 3),
    dim=st.one_of(st.integers(1, 40), st.just(300)),
    dtype=st.sampled_from(FLOATS),
    wide_weight=st.booleans(),
    residual=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_rms_norm(
    way: Way,
    tokens: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    wide_weight: bool,
    residual: bool,
    offset: float,
) -> None:
    x = torch.randn(tokens, heads + 1, dim + 3).to(dtype)[:, 1:, :dim]
    weight = torch.randn(dim).to(torch.float32 if wide_weight else dtype)
    old = torch.randn(tokens, heads, dim).to(dtype)
    mine, theirs = (old.clone(), old.clone()) if residual else (None, None)
    with with_way(way, dtype) as backend:
        got = ak.rms_norm(x, weight, 1e-5, residual=mine, weight_offset=offset, backend=backend)
    agree(got, ak.reference.rms_norm(x, weight, 1e-5, residual=theirs, weight_offset=offset))
    if mine is not None and theirs is not None:
        assert torch.equal(mine, theirs)  # one sum, one rounding
        assert tokens == 0 or not torch.equal(mine, old)
    with with_way(way, dtype) as backend:
        flat = x[:, 0].contiguous()
        assert torch.equal(ak.rms_norm(flat, weight, 1e-5, out=flat, backend=backend), flat)  # in place


@pytest.mark.parametrize("way", ways())
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    dim=st.sampled_from([2, 7, 32, 64, 130]),
    part=st.floats(0.0, 1.0),
    dtype=st.sampled_from(FLOATS),
    interleaved=st.booleans(),
    only_q=st.booleans(),
)
def test_rotary(
    way: Way, tokens: int, dim: int, part: float, dtype: torch.dtype, interleaved: bool, only_q: bool
) -> None:
    half = int(part * (dim // 2))
    fused = torch.randn(tokens, 5, dim).to(dtype)  # three query heads, two key heads
    angles = torch.rand(20, half)
    cos, sin, positions = angles.cos(), angles.sin(), torch.randint(0, 20, (tokens,))
    mine, theirs = fused.clone(), fused.clone()
    with with_way(way, dtype) as backend:
        k = None if only_q else mine[:, 3:]
        ak.rotary(mine[:, :3], k, cos, sin, positions, interleaved=interleaved, backend=backend)
    k = None if only_q else theirs[:, 3:]
    ak.reference.rotary(theirs[:, :3], k, cos, sin, positions, interleaved=interleaved)
    agree(mine, theirs)
    assert torch.equal(mine[..., 2 * half :], fused[..., 2 * half :])


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (2, 17), (5, 160), (3, 3000)])
def test_gated(way: Way, op: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tokens, width = shape
    gate_up = (10 * torch.randn(tokens, 2 * width + 3)).to(dtype)[:, : 2 * width]
    with with_way(way, dtype) as backend:
        got = getattr(ak, op)(gate_up, backend=backend)
    agree(got, getattr(ak.reference, op)(gate_up), at_least=10.0)  # torch's own GELU is that coarse


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
def test_gated_far_out(way: Way, op: str) -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, 1e9, float("nan")]])
    with with_way(way, torch.float32) as backend:
        got = getattr(ak, op)(torch.cat([gate, torch.ones_like(gate)], dim=1), backend=backend)
    expected = getattr(ak.reference, op)(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int8", [False, True])
def test_write_kv(way: Way, dtype: torch.dtype, int8: bool) -> None:
    """The same bits from all, where slots say, and nothing elsewhere."""
    blocks, heads, size, dim, tokens = 5, 3, 4, 37, 9
    fused = torch.randn(tokens, 2 * heads, dim + 2).to(dtype)[..., 1:-1]
    fused[2] = 0.0
    slots = torch.randperm(blocks * size)[:tokens]
    slots[4] = -1
    outcomes = []
    for backend_way in (way, ("reference", None)):
        caches = [
            torch.full((blocks, heads, size, dim), 7.0).to(torch.int8 if int8 else dtype) for _ in range(2)
        ]
        scales = [torch.full((blocks, heads, size), 7.0) if int8 else None for _ in range(2)]
        with with_way(backend_way, dtype) as backend:
            ak.write_kv(
                fused[:, :heads],
                fused[:, heads:],
                *caches,
                slots,
                k_scale=scales[0],
                v_scale=scales[1],
                backend=backend,
            )
        outcomes.append([*caches, *(scale for scale in scales if scale is not None)])
    for got, expected in zip(*outcomes, strict=True):
        assert torch.equal(got, expected)
    free = torch.ones(blocks * size, dtype=torch.bool)
    free[slots[slots >= 0]] = False
    assert (outcomes[0][0].transpose(1, 2).reshape(blocks * size, heads, dim)[free] == 7).all()


@pytest.mark.parametrize("way", ways())
def test_row_of_nan_stays_its_own(way: Way) -> None:
    """What is not finite shows in its row, and in no other."""
    x, weight = torch.randn(6, 128), torch.randn(40, 128)
    x[2, 7], x[4, 9] = float("nan"), float("inf")
    quantized, scale = ak.quantize_int8(weight)
    packed, scale4, zero = ak.quantize_int4(weight, 64)
    with with_way(way, torch.float32) as backend:
        results: list[Any] = [
            ak.linear(x, weight, backend=backend),
            ak.linear_int8(x, quantized, scale, backend=backend),
            ak.linear_int4(x, packed, scale4, zero, group_size=64, backend=backend),
        ]
    for y in results:
        finite = y.isfinite()
        assert finite[[0, 1, 3, 5]].all()
        assert not finite[[2, 4]].any()


def test_quantization_error_bounds() -> None:
    weight = torch.randn(50, 256) * torch.rand(50, 1)
    weight[3] = 0.0
    quantized, scale = ak.quantize_int8(weight)
    error = (ak.reference.dequantize_int8(quantized, scale) - weight).abs()
    assert (error <= scale.unsqueeze(1) * 0.5001).all()
    for group_size in (32, 128):
        packed, scale, zero = ak.quantize_int4(weight, group_size)
        error = (ak.reference.dequantize_int4(packed, scale, zero, group_size) - weight).abs()
        assert (error <= scale.repeat_interleave(group_size, dim=1) * 1.0001).all()
        assert packed.shape == (50, 128)


def test_no_gradients_are_recorded() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    weight = torch.randn(8, 32, requires_grad=True)
    for backend in (None, "portable", "reference"):
        assert not ak.linear(x, weight, backend=backend).requires_grad


def test_fp16_on_the_cpu_runs_portably() -> None:
    x = torch.randn(3, 32).half()
    assert ak.linear(x, torch.randn(8, 32).half()).dtype == torch.float16
    with contextlib.suppress(ak.BackendUnavailableError):
        ak.linear(x, torch.randn(8, 32).half(), backend="cpu")
        pytest.fail("expected BackendUnavailableError")


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_products_larger_than_the_dtype_before_they_are_scaled(way: Way, dtype: torch.dtype) -> None:
    x, weight = torch.ones(3, 4096, dtype=dtype), torch.full((5, 4096), 127, dtype=torch.int8)
    with with_way(way, dtype) as backend:
        got = ak.linear_int8(x, weight, torch.full((5,), 1e-4), backend=backend)
    assert torch.allclose(got.float(), torch.full((3, 5), 127 * 0.4096), rtol=2.0**-7)


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_products_over_nothing_are_the_bias(way: Way, m: int, dtype: torch.dtype) -> None:
    x, bias = torch.ones(m, 0, dtype=dtype), torch.arange(8).to(dtype)
    with with_way(way, dtype) as backend:
        for got in (
            ak.linear(x, torch.ones(8, 0, dtype=dtype), bias, backend=backend),
            ak.linear_int8(x, torch.ones(8, 0, dtype=torch.int8), torch.ones(8), bias, backend=backend),
            ak.linear_int4(
                *(x, torch.ones(8, 0, dtype=torch.uint8), torch.ones(8, 0), None, bias), group_size=32,
                backend=backend,
            ),
        ):  # fmt: skip
            assert torch.equal(got, bias.expand(m, -1))
