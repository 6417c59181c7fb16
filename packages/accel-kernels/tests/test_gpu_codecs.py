"""The CUDA kernels of the codecs give the reference's bits, and wait for nothing."""

from __future__ import annotations

import importlib.util
from typing import Any

import accel_kernels as ak
import pytest
import torch
from codec_lab import FLOATS, floats, message, same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed"),
]
FORMS: list[dict[str, Any]] = [
    {"bits": bits, "block_size": size, "symmetric": symmetric}
    for bits in (8, 4)
    for size in (6, 256, 5000)
    for symmetric in (True, False)
]


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """On the device, ``offset`` elements past an allocation's start."""
    return torch.cat([tensor.new_zeros(offset), tensor]).cuda()[offset:]


def test_is_the_default() -> None:
    assert ak.report()["quantize_blocks"]["cuda"].backend == "cuda"
    assert ak.report()["pack_signs"]["cuda"].backend == "cuda"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1])
def test_quantize(form: dict[str, Any], dtype: torch.dtype, offset: int) -> None:
    for numel in (1, 101, 50_001):
        src = floats(numel, dtype)
        src[numel // 2] = float("nan")
        for seed in (None, 3):
            expected = message(ak.block_bytes(numel, **form))
            got = moved(message(expected.numel()), offset)
            ak.quantize_blocks(src, expected, **form, seed=seed, backend="reference")
            ak.quantize_blocks(moved(src, offset), got, **form, seed=seed)
            assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_sources", [1, 2, 8, 20])
@pytest.mark.parametrize("offset", [0, 1])
def test_sums(form: dict[str, Any], num_sources: int, offset: int) -> None:
    numel = 20_001
    sources = [message(ak.block_bytes(numel, **form)) for _ in range(num_sources)]
    for k, source in enumerate(sources):
        ak.quantize_blocks(floats(numel, seed=k), source, **form)
    there = [moved(source, offset) for source in sources]
    for dtype in FLOATS:
        expected, got = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype, device="cuda")
        ak.dequantize_sum(sources, expected, scale=0.3, **form, backend="reference")
        ak.dequantize_sum(there, got, scale=0.3, **form)
        assert same(got.cpu(), expected)
    expected, got = message(sources[0].numel()), moved(message(sources[0].numel()), offset)
    ak.requantize_sum(sources, expected, n=numel, scale=0.3, seed=7, **form, backend="reference")
    ak.requantize_sum(there, got, n=numel, scale=0.3, seed=7, **form)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [1, 33, 4097, 1_000_003])
@pytest.mark.parametrize("offset", [0, 1])
def test_signs(norm: str, dtype: torch.dtype, numel: int, offset: int) -> None:
    src, error = floats(numel, dtype), floats(numel, seed=1)
    there, expected = moved(error, offset), message(ak.sign_bytes(numel))
    got = moved(message(expected.numel()), offset)
    ak.pack_signs(src, expected, error=error, norm=norm)
    ak.pack_signs(moved(src, offset), got, error=there, norm=norm)
    assert torch.equal(got.cpu(), expected)
    assert same(there.cpu(), error)
    for count in (1, 3, 20):
        mean, there_mean = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype, device="cuda")
        ak.mean_signs([expected] * count, mean, backend="reference")
        ak.mean_signs([got] * count, there_mean)
        assert same(there_mean.cpu(), mean)


def test_no_synchronisation() -> None:
    numel, form = 10_000, {"bits": 8, "block_size": 256}
    x, y = torch.randn(numel, device="cuda"), torch.empty(numel, device="cuda")
    error = torch.zeros(numel, device="cuda")
    sent = torch.empty(ak.block_bytes(numel, **form), dtype=torch.uint8, device="cuda")
    again, signs = torch.empty_like(sent), torch.empty(ak.sign_bytes(numel), dtype=torch.uint8, device="cuda")

    def everything() -> None:
        ak.quantize_blocks(x, sent, **form)
        ak.dequantize_sum([sent] * 9, y, **form)
        ak.requantize_sum([sent] * 2, again, n=numel, **form)
        ak.pack_signs(x, signs, error=error)
        ak.mean_signs([signs] * 9, y)

    everything()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
