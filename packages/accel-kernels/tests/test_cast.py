"""cast_copy: rounds like torch; stochastic rounding is unbiased, reproducible and the same from every back end."""

from __future__ import annotations

import contextlib
from typing import Any

import accel_kernels as ak
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
Runner = tuple[str, str | None]


def run(runner: Runner, src: torch.Tensor, dst: torch.Tensor, **options: Any) -> torch.Tensor:
    backend, isa = runner
    with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
        ak.cast_copy(src, dst, backend=backend, **options)
    return dst


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=1.0).view(torch.uint8), b.nan_to_num(nan=1.0).view(torch.uint8)
    )


def every_kind_of_float(numel: int) -> torch.Tensor:
    """Random bit patterns: all exponents, subnormals, infinities, NaN; and the edges of the 16-bit formats."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(1 << 31), (1 << 31) - 1, (numel,), generator=generator).to(torch.int32)
    near_one = torch.randn(numel, generator=generator) * torch.exp(
        torch.randn(numel, generator=generator) * 8
    )
    edges = [
        65504.0,
        65519.996,
        65520.0,
        65536.0,
        3.3895e38,
        3.3962e38,
        6.1e-5,
        5.97e-8,
        2.98e-8,
        2.9802322e-8,
        1e-40,
    ]
    edge = torch.tensor([*edges, *(-e for e in edges), 0.0, -0.0])
    return torch.cat([patterns.view(torch.float32), near_one, edge])


@pytest.mark.parametrize("dst_dtype", FLOATS)
@pytest.mark.parametrize("src_dtype", FLOATS)
def test_rounds_like_torch(runner: Runner, src_dtype: torch.dtype, dst_dtype: torch.dtype) -> None:
    src = every_kind_of_float(50_000).to(src_dtype)
    assert same(run(runner, src, torch.empty_like(src, dtype=dst_dtype)), src.to(dst_dtype))


@pytest.mark.parametrize("src_dtype", HALVES)
def test_every_16_bit_value(runner: Runner, src_dtype: torch.dtype) -> None:
    src = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(src_dtype)
    for dst_dtype in FLOATS:
        assert same(run(runner, src, torch.empty_like(src, dtype=dst_dtype)), src.to(dst_dtype))


@pytest.mark.parametrize("numel", [2_500_001, 5_000_003])  # written around the caches on the CPU
@pytest.mark.parametrize("dst_dtype", FLOATS)
def test_large_copies(numel: int, dst_dtype: torch.dtype) -> None:
    src = torch.randn(numel)
    dst = torch.full((numel + 8,), 3.0, dtype=dst_dtype)
    ak.cast_copy(src, dst[3:-5])
    assert torch.equal(dst[3:-5], src.to(dst_dtype))
    assert (dst[:3] == 3).all()
    assert (dst[-5:] == 3).all()


@settings(max_examples=25, deadline=None)
@given(
    numel=st.one_of(st.integers(0, 200), st.integers(0, 70_000)),
    offsets=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    src_dtype=st.sampled_from(FLOATS),
    dst_dtype=st.sampled_from(FLOATS),
    scale=st.sampled_from([1.0, 0.5, 3.7, 1e-6]),
    seed=st.one_of(st.none(), st.integers(-(2**70), 2**70)),
)
def test_against_reference(
    runner: Runner,
    numel: int,
    offsets: tuple[int, int],
    src_dtype: torch.dtype,
    dst_dtype: torch.dtype,
    scale: float,
    seed: int | None,
) -> None:
    src = every_kind_of_float(40_000).to(src_dtype)[offsets[0] : offsets[0] + numel]
    dst = torch.zeros(numel + offsets[1] + 1, dtype=dst_dtype)
    options = {"scale": scale, "stochastic": seed is not None, "seed": seed}
    run(runner, src, dst[offsets[1] : offsets[1] + numel], **options)
    expected = torch.empty(numel, dtype=dst_dtype)
    ak.reference.cast_copy(src, expected, **options)  # type: ignore[arg-type]
    assert same(dst[offsets[1] : offsets[1] + numel], expected)
    assert dst[-1] == 0
    assert not dst[: offsets[1]].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [1.001, -0.3333, 1e-6, 2.0**-20 * 1.3])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype, value: float) -> None:
    n = 200_000
    src, dst = torch.full((n,), value), torch.empty(n, dtype=dtype)
    ak.cast_copy(src, dst, stochastic=True, seed=5)
    values = dst.float().unique()
    assert values.numel() == 2  # the two neighbours
    assert values.min() < value < values.max()
    gap = float(values.max() - values.min())
    assert abs(float(dst.double().mean()) - float(src[0].double())) < 5 * gap / 2 / n**0.5
    ak.cast_copy(src, dst)
    assert dst.unique().numel() == 1  # to nearest: always the same one


def test_exact_values_stay(runner: Runner) -> None:
    src = torch.arange(-128, 128).float()
    for dtype in HALVES:
        dst = run(runner, src, torch.empty(256, dtype=dtype), stochastic=True, seed=1)
        assert torch.equal(dst.float(), src)


def test_seeds_and_threads(run_threads: Any) -> None:
    src = torch.randn(200_000)
    outcomes = []
    for threads in (1, 2, 3):
        with run_threads(threads):
            dst = torch.empty(200_000, dtype=torch.bfloat16)
            ak.cast_copy(src, dst, stochastic=True, seed=11)
            outcomes.append(dst)
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
    other = torch.empty(200_000, dtype=torch.bfloat16)
    ak.cast_copy(src, other, stochastic=True, seed=12)
    assert 0.2 < float((other != outcomes[0]).float().mean()) < 0.45  # 1/3 where the remainder is uniform
