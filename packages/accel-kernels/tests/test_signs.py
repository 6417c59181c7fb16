"""Messages of signs: layout by hand, nothing lost between message and error, non-finite input, any size."""

from __future__ import annotations

import math
import struct
from typing import Any

import accel_kernels as ak
import numpy as np
import pytest
import torch
from codec_lab import FLOATS, SIZES, Runner, floats, message, on, same
from hypothesis import given, settings
from hypothesis import strategies as st

REFERENCE: Runner = ("reference", None)


def packed(
    runner: Runner, src: torch.Tensor, error: torch.Tensor | None = None, norm: str = "l2"
) -> torch.Tensor:
    out = message(ak.sign_bytes(src.numel()))
    on(runner, ak.pack_signs, src, out, error=error, norm=norm)
    return out


def unpacked(
    runner: Runner, src: torch.Tensor, numel: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.full((numel,), -7.0, dtype=dtype)
    on(runner, ak.unpack_signs, src, out)
    return out


def test_by_hand(runner: Runner) -> None:
    src = torch.tensor([3.0, -4.0, 0.0, -0.0, 1.0, -1.0, 1.0, -1.0, -2.0])
    error = torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    got = packed(runner, src, error, norm="l1")  # |c| sums to 14, over 9 elements
    scale = np.float32(14 / 9)
    assert bytes(got.tolist()) == struct.pack("<f2B", scale, 0b01011001, 0)
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1, -1])
    assert torch.equal(unpacked(runner, got, 9), signs * float(scale))
    c = torch.tensor([3.0, -4.0, -1.0, 0.0, 1.0, -1.0, 1.0, -1.0, -2.0])
    assert torch.equal(error, c - signs * float(scale))


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 5), (8, 5), (9, 6), (1000, 129)])
def test_sign_bytes(n: int, expected: int) -> None:
    assert ak.sign_bytes(n) == expected


@settings(max_examples=60, deadline=None)
@given(
    numel=SIZES,
    src_dtype=st.sampled_from(FLOATS),
    out_dtype=st.sampled_from(FLOATS),
    offsets=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    norm=st.sampled_from(["l1", "l2"]),
    with_error=st.booleans(),
    data_seed=st.integers(0, 99),
)
def test_against_reference(
    runner: Runner,
    numel: int,
    src_dtype: torch.dtype,
    out_dtype: torch.dtype,
    offsets: tuple[int, int],
    norm: str,
    with_error: bool,
    data_seed: int,
) -> None:
    src = floats(numel + offsets[0], src_dtype, data_seed)[offsets[0] :]
    errors = [
        floats(numel + offsets[1], seed=data_seed + 1)[offsets[1] :] if with_error else None for _ in range(2)
    ]
    out = message(ak.sign_bytes(numel), offsets[1])
    on(runner, ak.pack_signs, src, out, error=errors[0], norm=norm)
    assert torch.equal(out, packed(REFERENCE, src, errors[1], norm))
    if errors[0] is not None and errors[1] is not None:
        assert same(errors[0], errors[1])
    around = torch.full((numel + offsets[0] + 1,), 3.0, dtype=out_dtype)
    on(runner, ak.unpack_signs, out, around[offsets[0] : -1])
    assert same(around[offsets[0] : -1], unpacked(REFERENCE, out, numel, out_dtype))
    assert (around[: offsets[0]] == 3).all()
    assert around[-1] == 3


@settings(max_examples=40, deadline=None)
@given(numel=st.integers(1, 20_000), norm=st.sampled_from(["l1", "l2"]), dtype=st.sampled_from(FLOATS))
def test_nothing_is_lost(numel: int, norm: str, dtype: torch.dtype) -> None:
    """What comes back and the new error add up to what went in; the scale is the norm's definition."""
    src, error = floats(numel, dtype, spread=1.0), floats(numel, seed=1, spread=1.0)
    c = src.float() + error
    got = packed(("portable", None), src, error, norm)
    back = unpacked(("portable", None), got, numel)
    torch.testing.assert_close(
        back.double() + error.double(), c.double(), rtol=0, atol=float(c.abs().max()) * 2e-7
    )
    exact = (
        math.sqrt(math.fsum(v * v for v in c.tolist()) / numel)
        if norm == "l2"
        else math.fsum(map(abs, c.tolist())) / numel
    )
    assert float(back[0].abs()) == pytest.approx(exact, rel=1e-7)
    assert torch.equal(back >= 0, (c >= 0) | (back == 0))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("numel", [1, 100, 50_000])
def test_non_finite_input_is_seen_and_costs_no_error(
    runner: Runner, bad: float, norm: str, numel: int
) -> None:
    src, error = floats(numel), floats(numel, seed=1)
    before = error.clone()
    src[numel // 2] = bad
    got = packed(runner, src, error, norm)
    assert torch.equal(got, packed(REFERENCE, src, before.clone(), norm))
    assert torch.equal(error, before)
    assert unpacked(runner, got, numel).isnan().all()
    mean = torch.empty(numel)
    on(runner, ak.mean_signs, [packed(runner, before), got], mean)
    assert mean.isnan().all()


@settings(max_examples=30, deadline=None)
@given(numel=SIZES, num_sources=st.integers(1, 9), dtype=st.sampled_from(FLOATS), offset=st.integers(0, 5))
def test_mean(runner: Runner, numel: int, num_sources: int, dtype: torch.dtype, offset: int) -> None:
    sources = []
    for k in range(num_sources):
        source = message(ak.sign_bytes(numel), offset * k)
        source.copy_(packed(REFERENCE, floats(numel, seed=k)))
        sources.append(source)
    total = torch.zeros(numel)
    for k, source in enumerate(sources):
        total = unpacked(REFERENCE, source, numel) if k == 0 else total + unpacked(REFERENCE, source, numel)
    out = torch.empty(numel + offset, dtype=dtype)[offset:]
    on(runner, ak.mean_signs, sources, out)
    assert same(out, (total * (1.0 / num_sources)).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_number_of_threads_does_not_matter(runner: Runner, dtype: torch.dtype, run_threads: Any) -> None:
    numel = 400_001
    src, outcomes = floats(numel, dtype), []
    for threads in (1, 2, 3, 5):
        with run_threads(threads):
            error = floats(numel, seed=1)
            got = packed(runner, src, error)
            mean = torch.empty(numel)
            on(runner, ak.mean_signs, [got, got, got], mean)
            outcomes.append((got, error, mean))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, outcomes[0], strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_outputs(runner: Runner, dtype: torch.dtype) -> None:
    """Past the size from which what is written goes around the caches, at an odd address."""
    numel = 5_000_003
    src = floats(numel)
    error, other = torch.zeros(numel), torch.zeros(numel)
    got = packed(runner, src, error)
    assert torch.equal(got, packed(("portable", None), src, other))
    assert same(error, other)
    around = torch.full((numel + 8,), 3.0, dtype=dtype)
    on(runner, ak.unpack_signs, got, around[3:-5])
    assert torch.equal(around[3:-5], unpacked(("portable", None), got, numel, dtype))
    assert (around[:3] == 3).all()
    assert (around[-5:] == 3).all()


def test_error_feedback_sends_everything_in_the_end() -> None:
    """A constant gradient, compressed with feedback: the sum of what was sent stays within the error of the truth."""
    truth = floats(500, spread=0.5)
    error, sent = torch.zeros(500), torch.zeros(500, dtype=torch.float64)
    for _ in range(50):
        sent += unpacked(REFERENCE, packed(REFERENCE, truth, error), 500)
    torch.testing.assert_close(sent + error, 50 * truth.double(), rtol=1e-4, atol=1e-4)
