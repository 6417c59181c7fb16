"""Block-wise quantization: layout by hand, error bounds, non-finite input, stochastic rounding; any size and format."""

from __future__ import annotations

import struct
from typing import Any

import accel_kernels as ak
import pytest
import torch
from codec_lab import (
    FLOATS,
    SIZES,
    Runner,
    dequantized,
    floats,
    formats,
    message,
    on,
    per_element,
    quantized,
    same,
)
from hypothesis import given, settings
from hypothesis import strategies as st

REFERENCE: Runner = ("reference", None)


def test_symmetric_8_bits_by_hand(runner: Runner) -> None:
    src = torch.tensor([1.0, -127.0, 63.5, 0.0, 2.0])  # blocks of 4: 127 is the largest, then 2
    form = {"bits": 8, "block_size": 4}
    got = quantized(runner, src, form)
    assert bytes(got.tolist()) == struct.pack("<2f5b", 1.0, 2.0 / 127, 1, -127, 64, 0, 127)
    assert torch.equal(dequantized(runner, got, 5, form), torch.tensor([1.0, -127.0, 64.0, 0.0, 2.0]))


def test_symmetric_4_bits_by_hand(runner: Runner) -> None:
    src = torch.tensor([7.0, -7.0, 2.5, 3.5, -1.0])  # half to even: 2 and 4
    form = {"bits": 4, "block_size": 6}
    got = quantized(runner, src, form)
    assert bytes(got.tolist()) == struct.pack("<f3B", 1.0, 15 | 1 << 4, 10 | 12 << 4, 7)
    assert torch.equal(dequantized(runner, got, 5, form), torch.tensor([7.0, -7.0, 2.0, 4.0, -1.0]))


def test_asymmetric_by_hand(runner: Runner) -> None:
    src = torch.tensor([10.0, 265.0, 11.0, 200.0])
    form = {"bits": 8, "block_size": 256, "symmetric": False}
    got = quantized(runner, src, form)
    assert bytes(got.tolist()) == struct.pack("<2f4B", 1.0, 10.0, 0, 255, 1, 190)
    assert torch.equal(dequantized(runner, got, 4, form), src)
    src = torch.tensor([-3.0, 12.0, 0.0])
    form = {"bits": 4, "block_size": 2, "symmetric": False}
    got = quantized(runner, src, form)
    assert bytes(got.tolist()) == struct.pack("<4f2B", 1.0, 2.0**-126, -3.0, 0.0, 0 | 15 << 4, 0)
    assert torch.equal(dequantized(runner, got, 3, form), src)


@pytest.mark.parametrize(
    ("n", "form", "expected"),
    [
        (0, {"bits": 8, "block_size": 256}, 0),
        (1, {"bits": 4, "block_size": 256}, 5),
        (257, {"bits": 4, "block_size": 256}, 8 + 129),
        (512, {"bits": 8, "block_size": 256, "symmetric": False}, 16 + 512),
        (10, {"bits": 8, "block_size": 1}, 50),
    ],
)
def test_block_bytes(n: int, form: dict[str, Any], expected: int) -> None:
    assert ak.block_bytes(n, **form) == expected


@settings(max_examples=60, deadline=None)
@given(
    numel=SIZES,
    form=formats(),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    offsets=st.tuples(st.integers(0, 17), st.integers(0, 17)),
    seed=st.one_of(st.none(), st.integers(-(2**70), 2**70)),
    data_seed=st.integers(0, 99),
)
def test_against_reference(
    runner: Runner,
    numel: int,
    form: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    offsets: tuple[int, int],
    seed: int | None,
    data_seed: int,
) -> None:
    src = floats(numel + offsets[0], dtypes[0], data_seed)[offsets[0] :]
    out = message(ak.block_bytes(numel, **form), offsets[1])
    on(runner, ak.quantize_blocks, src, out, **form, seed=seed)
    assert torch.equal(out, quantized(REFERENCE, src, form, seed=seed))
    around = torch.full((numel + offsets[0] + 1,), 3.0, dtype=dtypes[1])
    on(runner, ak.dequantize_blocks, out, around[offsets[0] : -1], **form)
    assert same(around[offsets[0] : -1], dequantized(REFERENCE, out, numel, form, dtypes[1]))
    assert (around[: offsets[0]] == 3).all()
    assert around[-1] == 3


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 3000),
    form=formats(),
    dtype=st.sampled_from(FLOATS),
    magnitude=st.sampled_from([1.0, 1e-30, 1e4]),
    shift=st.sampled_from([0.0, 1.0, -100.0]),
    seed=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_error_bound(
    numel: int, form: dict[str, Any], dtype: torch.dtype, magnitude: float, shift: float, seed: int | None
) -> None:
    """|x - x'| <= scale / 2 + 2^-22 m (2 m asymmetric), stochastic <= scale + ...; the scale is the range's."""
    src = ((floats(numel, spread=1.0) + shift) * magnitude).to(dtype)
    src = src.nan_to_num(posinf=6e4, neginf=-6e4)
    x = src.double()
    got = quantized(("portable", None), src, form, seed=seed)
    back = dequantized(("portable", None), got, numel, form).double()
    width = min(form["block_size"], numel)
    blocks = torch.nn.functional.pad(x, (0, -numel % width), value=torch.nan).view(-1, width)
    largest, smallest = (
        blocks.nan_to_num(nan=-torch.inf).amax(1),
        blocks.nan_to_num(nan=torch.inf).amin(1),
    )
    m = torch.maximum(largest, -smallest)
    if form["symmetric"]:
        step = m / (127 if form["bits"] == 8 else 7)
    else:
        step = (largest - smallest) / (255 if form["bits"] == 8 else 15)
        m = 2 * m
    step = step.clamp(min=2.0**-126)
    bound = step * (0.5 if seed is None else 1.0) + m * 2.0**-22
    bound = per_element(bound, numel, width)
    assert ((x - back).abs() <= bound).all()


def test_the_error_bound_is_reached() -> None:
    x = torch.tensor([127.0, 0.49999, 63.5001])
    back = dequantized(REFERENCE, quantized(REFERENCE, x, {"bits": 8, "block_size": 4}), 3, {"bits": 8})
    assert (x - back).abs().max() > 0.499


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_non_finite_blocks_come_back_as_nan(runner: Runner, bits: int, symmetric: bool, bad: float) -> None:
    """All of the block, and no other."""
    form = {"bits": bits, "block_size": 50, "symmetric": symmetric}
    src = floats(333)
    src[120] = bad
    src[-1] = bad
    got = quantized(runner, src, form)
    assert torch.equal(got, quantized(REFERENCE, src, form))
    back = dequantized(runner, got, 333, form)
    expected = torch.zeros(333, dtype=torch.bool)
    expected[100:150] = True
    expected[300:] = True
    assert torch.equal(back.isnan(), expected)
    total = torch.empty(333)
    on(runner, ak.dequantize_sum, [quantized(runner, floats(333), form), got], total, **form)
    assert torch.equal(total.isnan(), expected)
    again = message(got.numel())
    on(runner, ak.requantize_sum, [got, quantized(runner, floats(333), form)], again, n=333, **form)
    assert torch.equal(dequantized(runner, again, 333, form).isnan(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_extremes(runner: Runner, bits: int, symmetric: bool) -> None:
    form = {"bits": bits, "block_size": 4, "symmetric": symmetric}
    values = [
        0.0,
        -0.0,
        0.0,
        -0.0,
        1e-45,
        -1e-45,
        2e-38,
        0.0,
        1e38,
        -1e38,
        3.0,
        0.0,
        -0.0,
        5.0,
        0.0,
        7.0,
        2.5,
    ]
    src = torch.tensor(values)
    for seed in (None, 3):
        got = quantized(runner, src, form, seed=seed)
        assert torch.equal(got, quantized(REFERENCE, src, form, seed=seed))
        back = dequantized(runner, got, src.numel(), form)
        assert back.isfinite().all()
        assert (back[:4] == 0).all()
        # The smallest scale there is, 2^-126, is larger than 2e-38 / 7.
        assert ((back - src).abs()[4:8] <= 2.0**-127 * (1 if seed is None else 2)).all()


def test_a_range_beyond_fp32_comes_back_as_nan(runner: Runner) -> None:
    src = torch.tensor([3e38, -3e38, 1.0])
    form = {"bits": 8, "block_size": 2, "symmetric": False}
    back = dequantized(runner, quantized(runner, src, form), 3, form)
    assert back.isnan().tolist() == [True, True, False]
    symmetric = {"bits": 8, "block_size": 2}
    assert dequantized(runner, quantized(runner, src, symmetric), 3, symmetric).isfinite().all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_right_on_average(bits: int, symmetric: bool) -> None:
    form = {"bits": bits, "block_size": 1000, "symmetric": symmetric}
    src = torch.linspace(-1.0, 1.3, 1000)
    total = torch.zeros(1000, dtype=torch.float64)
    rounds = 400
    for seed in range(rounds):
        total += dequantized(REFERENCE, quantized(REFERENCE, src, form, seed=seed), 1000, form)
    step = (1.3 if symmetric else 2.3) / (
        (127 if bits == 8 else 7) if symmetric else (255 if bits == 8 else 15)
    )
    nearest = dequantized(REFERENCE, quantized(REFERENCE, src, form), 1000, form)
    deviation = (total / rounds - src).abs().max()
    assert deviation < 5 * step * 0.5 / rounds**0.5  # a standard deviation is at most half a step
    assert (nearest - src).abs().max() > deviation  # to nearest, each is off for good


def test_stochastic_bits_depend_on_seed_and_index(runner: Runner) -> None:
    """Whole steps stay, the rest goes up as often as the fraction says, independent of blocks."""
    numel = 40_000
    src = torch.full((numel,), 0.25)
    src[::8] = 127.0  # scale 1 for every block of 8
    form = {"bits": 8, "block_size": 8}
    got = quantized(runner, src, form, seed=11)
    back = dequantized(runner, got, numel, form)
    assert (back[::8] == 127).all()
    rest = torch.arange(numel) % 8 != 0
    assert abs(back[rest].mean() - 0.25) < 0.01
    wider = dequantized(
        runner,
        quantized(runner, src, {"bits": 8, "block_size": 16}, seed=11),
        numel,
        {"bits": 8, "block_size": 16},
    )
    assert torch.equal(back, wider)
    other = dequantized(runner, quantized(runner, src, form, seed=12), numel, form)
    assert (back[rest] != other[rest]).float().mean() > 0.3


@settings(max_examples=40, deadline=None)
@given(
    numel=SIZES,
    form=formats(),
    out_bits=st.sampled_from([None, 4, 8]),
    num_sources=st.integers(1, 6),
    scale=st.sampled_from([1.0, 0.25, 1 / 3]),
    dtype=st.sampled_from(FLOATS),
    offset=st.integers(0, 5),
    seed=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_sums(
    runner: Runner,
    numel: int,
    form: dict[str, Any],
    out_bits: int | None,
    num_sources: int,
    scale: float,
    dtype: torch.dtype,
    offset: int,
    seed: int | None,
) -> None:
    """Exactly the sum of what each message stands for, in order; fused or in two steps."""
    if out_bits == 4 and form["block_size"] % 2:
        form = {**form, "block_size": form["block_size"] + 1}
    sources = []
    for k in range(num_sources):
        source = message(ak.block_bytes(numel, **form), offset * k)
        source.copy_(quantized(REFERENCE, floats(numel, seed=k), form))
        sources.append(source)
    expected = torch.zeros(numel)
    for k, source in enumerate(sources):
        part = dequantized(REFERENCE, source, numel, form)
        expected = part if k == 0 else expected + part
    expected = expected * scale
    out = torch.empty(numel + offset, dtype=dtype)[offset:]
    on(runner, ak.dequantize_sum, sources, out, scale=scale, **form)
    assert same(out, expected.to(dtype))
    out_form = {**form, "bits": out_bits or form["bits"]}
    again = message(ak.block_bytes(numel, **out_form), offset)
    on(runner, ak.requantize_sum, sources, again, n=numel, scale=scale, out_bits=out_bits, seed=seed, **form)
    assert torch.equal(again, quantized(REFERENCE, expected, out_form, seed=seed))


@pytest.mark.parametrize("bits", [8, 4])
def test_number_of_threads_does_not_matter(runner: Runner, bits: int, run_threads: Any) -> None:
    numel = 400_001
    src, form = floats(numel), {"bits": bits, "block_size": 250}
    outcomes = []
    for threads in (1, 2, 3, 5):
        with run_threads(threads):
            got = quantized(runner, src, form, seed=5)
            total = torch.empty(numel)
            on(runner, ak.dequantize_sum, [got, got, got], total, scale=0.3, **form)
            again = message(got.numel())
            on(runner, ak.requantize_sum, [got, got], again, n=numel, **form)
            outcomes.append((got, total, again))
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, outcomes[0], strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_outputs(runner: Runner, dtype: torch.dtype) -> None:
    """Past the size from which what is written goes around the caches, at an odd address."""
    numel, form = 5_000_003, {"bits": 8, "block_size": 256}
    src = floats(numel, dtype, spread=0.5)
    got = quantized(runner, src, form)
    assert torch.equal(got, quantized(("portable", None), src, form))
    around = torch.full((numel + 8,), 3.0, dtype=dtype)
    on(runner, ak.dequantize_blocks, got, around[3:-5], **form)
    assert torch.equal(around[3:-5], dequantized(("portable", None), got, numel, form, dtype))
    assert (around[:3] == 3).all()
    assert (around[-5:] == 3).all()
