"""The CUDA kernels of the codecs, run on the processor by an emulator of CUDA's threads, give the reference's bits."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel_kernels as ak
import numpy as np
import pytest
import torch
from accel_kernels.backends import cuda as launcher
from accel_kernels.backends.codecs import cuda as codecs
from accel_kernels.messages import BlockFormat
from codec_lab import floats, message, same

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator is compiled by g++")
EMULATOR = Path(__file__).with_name("cuda_emulator") / "emulator.h"
# What is PTX in common.cuh, in C++.
PTX = {
    'asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));': "x = float(as<_Float16>(h));",
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));': "h = as<u16>(_Float16(x));",
}
WRAPPER = """#include "emulator.h"
{source}
extern "C" void launch(unsigned grid, unsigned num_threads, void** arguments) {{
    emulator::launch(&{expression}, grid, num_threads, arguments);
}}
"""


def gcc(*arguments: str | Path) -> None:
    """Compile; fused arithmetic would give other bits."""
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-w"]
    subprocess.run([str(COMPILER), *options, *map(str, arguments)], check=True)


def compiled(file: str, expression: str, folder: Path) -> Callable[..., None]:
    """A kernel that is launched as CuPy would launch it, on CPU memory."""
    source = launcher.load_source(file)
    for ptx, text in PTX.items():
        assert ptx in source
        source = source.replace(ptx, text)
    text, library = folder / "kernel.cpp", folder / f"{len(list(folder.iterdir()))}.so"
    text.write_text(WRAPPER.format(source=source, expression=expression))
    gcc("-shared", f"-I{folder}", f"-I{EMULATOR.parent}", text, "-o", library)
    run = ctypes.CDLL(str(library)).launch

    def launch(grid: tuple[int], threads: tuple[int], arguments: tuple[Any, ...]) -> None:
        assert all(isinstance(argument, np.generic) for argument in arguments)
        held = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(one.ctypes.data for one in held))
        run(ctypes.c_uint(grid[0]), ctypes.c_uint(threads[0]), pointers)

    return launch


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("kernels")
    gcc("-x", "c++-header", EMULATOR, "-o", folder / "emulator.h.gch")  # read once, not for every kernel
    kernels: dict[tuple[str, str], Callable[..., None]] = {}

    def kernel(file: str, expression: str) -> Callable[..., None]:
        if (file, expression) not in kernels:
            kernels[file, expression] = compiled(file, expression, folder)
        return kernels[file, expression]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "kernel", kernel)
        patch.setattr(codecs, "on_stream_of", lambda tensor: contextlib.nullcontext())
        patch.setattr(codecs, "num_blocks", lambda numel, device: 3)
        yield codecs


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# bits, block size, symmetric, seed, dtype, elements; a block of 5000 gets 256 threads, a smaller one 32
QUANTIZE = [
    (8, 256, True, None, F32, 1033),
    (8, 7, True, None, BF16, 100),
    (8, 7, False, 5, F16, 1),
    (4, 64, True, 3, F32, 1001),
    (4, 6, False, None, BF16, 333),
    (8, 5000, True, None, F32, 12_001),
    (4, 5000, False, 9, F32, 12_001),
]


@pytest.mark.parametrize(("bits", "block_size", "symmetric", "seed", "dtype", "numel"), QUANTIZE)
@pytest.mark.parametrize("offset", [0, 1])
def test_quantize(
    emulated: Any,
    bits: int,
    block_size: int,
    symmetric: bool,
    seed: int | None,
    dtype: torch.dtype,
    numel: int,
    offset: int,
) -> None:
    form = BlockFormat(bits, block_size, symmetric)
    src = floats(numel + offset, dtype)[offset:]
    src[numel // 2] = float("nan")
    got, expected = (message(form.message_bytes(numel), offset) for _ in range(2))
    emulated.quantize(src, got, form, seed)
    ak.quantize_blocks(
        src, expected, bits=bits, block_size=block_size, symmetric=symmetric, seed=seed, backend="reference"
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "num_sources", "dtype", "numel", "out_bits", "seed"),
    [
        (8, 256, True, 1, F32, 1033, 8, None),
        (8, 7, False, 3, BF16, 101, 8, 1),
        (4, 64, True, 2, F16, 1001, 4, None),
        (4, 6, False, 20, F32, 333, 8, None),  # more than one launch adds
        (8, 5000, True, 9, F32, 12_001, 4, 4),
    ],
)
@pytest.mark.parametrize("offset", [0, 1])
def test_sums(
    emulated: Any,
    bits: int,
    block_size: int,
    symmetric: bool,
    num_sources: int,
    dtype: torch.dtype,
    numel: int,
    out_bits: int,
    seed: int | None,
    offset: int,
) -> None:
    form = BlockFormat(bits, block_size, symmetric)
    out_form = form.with_bits(out_bits)
    options = {"bits": bits, "block_size": block_size, "symmetric": symmetric, "backend": "reference"}
    sources = [message(form.message_bytes(numel), offset) for _ in range(num_sources)]
    for k, source in enumerate(sources):
        x = floats(numel, seed=k)
        x[:1] = float("inf") if k == 0 else 0.0
        ak.quantize_blocks(x, source, **options)
    got, expected = (torch.zeros(numel + offset, dtype=dtype)[offset:] for _ in range(2))
    emulated.dequantize_sum(sources, got, form, 0.3)
    ak.dequantize_sum(sources, expected, scale=0.3, **options)
    assert same(got, expected)
    message_got, message_expected = (message(out_form.message_bytes(numel), offset) for _ in range(2))
    emulated.requantize_sum(sources, message_got, numel, form, out_form, 0.3, seed)
    ak.requantize_sum(sources, message_expected, n=numel, scale=0.3, out_bits=out_bits, seed=seed, **options)
    assert torch.equal(message_got, message_expected)


@pytest.mark.parametrize(
    ("numel", "dtype", "norm", "with_error"),
    [(1, F32, "l2", True), (1000, BF16, "l1", True), (4097, F16, "l2", False), (20_001, F32, "l2", True)],
)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bad", [False, True])
def test_pack_signs(
    emulated: Any, numel: int, dtype: torch.dtype, norm: str, with_error: bool, offset: int, bad: bool
) -> None:
    src = floats(numel + offset, dtype)[offset:]
    if bad:
        src[-1] = float("inf")
    errors = [floats(numel + offset, seed=1)[offset:] if with_error else None for _ in range(2)]
    got, expected = (message(ak.sign_bytes(numel), offset) for _ in range(2))
    emulated.pack_signs(src, got, errors[0], norm == "l2")
    ak.pack_signs(src, expected, error=errors[1], norm=norm, backend="reference")
    assert torch.equal(got, expected)
    if errors[0] is not None and errors[1] is not None:
        assert same(errors[0], errors[1])


@pytest.mark.parametrize(
    ("numel", "num_sources", "dtype"), [(1, 1, F32), (1001, 3, BF16), (333, 20, F16), (5000, 2, F32)]
)
@pytest.mark.parametrize("offset", [0, 1])
def test_mean_signs(emulated: Any, numel: int, num_sources: int, dtype: torch.dtype, offset: int) -> None:
    sources = [message(ak.sign_bytes(numel), offset) for _ in range(num_sources)]
    for k, source in enumerate(sources):
        ak.pack_signs(floats(numel, seed=k), source, backend="reference")
    got, expected = (torch.zeros(numel + offset, dtype=dtype)[offset:] for _ in range(2))
    emulated.mean_signs(sources, got)
    ak.mean_signs(sources, expected, backend="reference")
    assert same(got, expected)
