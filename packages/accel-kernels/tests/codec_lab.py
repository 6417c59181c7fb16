"""Shared by the tests of codecs: inputs of every kind, calls on any back end, messages read by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Runner = tuple[str, str | None]

# None, one, odd, around the pieces in which kernels and sums work, and large enough for several threads.
SIZES = st.one_of(
    st.integers(0, 70), st.integers(0, 6000), st.sampled_from([4095, 4096, 4097, 1 << 15, (1 << 16) + 5])
)
BLOCK_SIZES = st.one_of(
    st.integers(1, 40), st.sampled_from([64, 100, 128, 255, 256, 1000, 2048, 5000, 10**9])
)


@st.composite
def formats(draw: st.DrawFn) -> dict[str, Any]:
    bits, block_size = draw(st.sampled_from([8, 4])), draw(BLOCK_SIZES)
    return {
        "bits": bits,
        "block_size": block_size + block_size % 2 if bits == 4 else block_size,
        "symmetric": draw(st.booleans()),
    }


def on(runner: Runner, op: Callable[..., None], *args: Any, **options: Any) -> None:
    """Call an op on a back end with an instruction set."""
    backend, isa = runner
    with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
        op(*args, backend=backend, **options)


def floats(
    numel: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 3.0
) -> torch.Tensor:
    """Of many magnitudes, some of them zero; all finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator)
    x = x * torch.exp(spread * torch.randn(numel, generator=generator))
    x = torch.where(torch.rand(numel, generator=generator) < 0.05, 0.0, x)
    return x.clamp(-6e4, 6e4).to(dtype)


def message(num_bytes: int, offset: int = 0) -> torch.Tensor:
    """Bytes at an address that no format of numbers would choose, all ones."""
    return torch.full((num_bytes + offset,), 0xFF, dtype=torch.uint8)[offset:]


def quantized(runner: Runner, src: torch.Tensor, form: dict[str, Any], **options: Any) -> torch.Tensor:
    out = message(ak.block_bytes(src.numel(), **form))
    on(runner, ak.quantize_blocks, src, out, **form, **options)
    return out


def dequantized(
    runner: Runner, src: torch.Tensor, numel: int, form: dict[str, Any], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    out = torch.full((numel,), -7.0, dtype=dtype)
    on(runner, ak.dequantize_blocks, src, out, **form)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaNs aside."""
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(nan=1.0).view(torch.uint8), b.nan_to_num(nan=1.0).view(torch.uint8))
    )


def per_element(values: torch.Tensor, numel: int, block_size: int) -> torch.Tensor:
    """One value a block, as one an element."""
    return values[torch.arange(numel) // block_size]
