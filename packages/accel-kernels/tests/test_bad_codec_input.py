"""Bad input of the codec ops: a clear error that names the argument, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel_kernels as ak
import pytest
import torch

N = 100
SIZE = ak.block_bytes(N, bits=8, block_size=32)


def floats(numel: int = N) -> torch.Tensor:
    return torch.ones(numel)


def data(size: int = SIZE) -> torch.Tensor:
    return torch.full((size,), 7, dtype=torch.uint8)


SIGNS = ak.sign_bytes(N)
both = torch.zeros(1000, dtype=torch.uint8)
FORM = {"bits": 8, "block_size": 32}
CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "bits": (
        lambda: ak.quantize_blocks(floats(), data(), bits=5),
        ValueError,
        "quantize_blocks: bits: expected 4 or 8, got 5",
    ),
    "block size": (
        lambda: ak.quantize_blocks(floats(), data(), bits=8, block_size=0),
        ValueError,
        "block_size: expected at least 1, got 0",
    ),
    "block size, type": (
        lambda: ak.quantize_blocks(floats(), data(), bits=8, block_size=32.0),  # type: ignore[arg-type]
        TypeError,
        "block_size: expected an integer, got 32.0",
    ),
    "odd block of half bytes": (
        lambda: ak.quantize_blocks(floats(), data(), bits=4, block_size=33),
        ValueError,
        "block_size: expected an even number for 4 bits, got 33",
    ),
    "message size": (
        lambda: ak.quantize_blocks(floats(), data(SIZE - 1), **FORM),
        ValueError,
        rf"out: expected {SIZE} bytes \(100 elements of 8 bits, blocks of 32\), got {SIZE - 1}",
    ),
    "message dtype": (
        lambda: ak.quantize_blocks(floats(), data().to(torch.int8), **FORM),
        TypeError,
        "out: expected torch.uint8, got torch.int8",
    ),
    "message layout": (
        lambda: ak.quantize_blocks(floats(), data(2 * SIZE)[::2], **FORM),
        ValueError,
        "out: expected a flat contiguous tensor",
    ),
    "floats, dtype": (
        lambda: ak.quantize_blocks(floats().double(), data(), **FORM),
        TypeError,
        "src: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
    ),
    "floats, shape": (
        lambda: ak.quantize_blocks(floats().view(10, 10), data(), **FORM),
        ValueError,
        r"src: .*pass src.view\(-1\)",
    ),
    "no tensor": (
        lambda: ak.quantize_blocks([1.0], data(), **FORM),  # type: ignore[arg-type]
        TypeError,
        "src: expected a torch.Tensor, got list",
    ),
    "device": (
        lambda: ak.quantize_blocks(floats(), data().to("meta"), **FORM),
        ValueError,
        "out: expected a tensor on cpu, like src, got meta",
    ),
    "seed": (
        lambda: ak.quantize_blocks(floats(), data(), **FORM, seed=1.5),  # type: ignore[arg-type]
        TypeError,
        "seed: expected an integer or None, got float",
    ),
    "onto itself": (
        lambda: ak.quantize_blocks(both[: 4 * N].view(torch.float32), both[300 : 300 + SIZE], **FORM),
        ValueError,
        "expected memory of its own",
    ),
    "negative n": (
        lambda: ak.block_bytes(-1, bits=8, block_size=32),
        ValueError,
        "block_bytes: n: expected at least 0, got -1",
    ),
    "message of another n": (
        lambda: ak.dequantize_blocks(data(), floats(N - 1), **FORM),
        ValueError,
        "dequantize_blocks: src: expected 115 bytes",
    ),
    "one tensor for a sequence": (
        lambda: ak.dequantize_sum(data(), floats(), **FORM),  # type: ignore[arg-type]
        TypeError,
        r"sources: expected a sequence of messages, got a tensor; pass \[message\]",
    ),
    "no message": (
        lambda: ak.dequantize_sum([], floats(), **FORM),
        ValueError,
        "sources: expected at least one message, got none",
    ),
    "one of several": (
        lambda: ak.dequantize_sum([data(), data(SIZE + 1)], floats(), **FORM),
        ValueError,
        r"sources\[1\]: expected 116 bytes .*, got 117",
    ),
    "scale": (
        lambda: ak.dequantize_sum([data()], floats(), scale="1", **FORM),  # type: ignore[arg-type]
        TypeError,
        "scale: expected a number, got str",
    ),
    "onto a source": (
        lambda: ak.requantize_sum([both[:SIZE]], both[SIZE - 1 : 2 * SIZE - 1], n=N, **FORM),
        ValueError,
        r"out: expected memory of its own, shares sources\[0\]'s",
    ),
    "a source within the result": (
        lambda: ak.requantize_sum([both[5 : SIZE + 5]], both[:SIZE], n=N, **FORM),
        ValueError,
        r"sources\[0\]: expected memory of its own, shares out's",
    ),
    "bits of the result": (
        lambda: ak.requantize_sum([data()], data(), n=N, out_bits=2, **FORM),
        ValueError,
        "out_bits: expected 4 or 8, got 2",
    ),
    "n": (
        lambda: ak.requantize_sum([data()], data(), n=100.0, **FORM),  # type: ignore[arg-type]
        TypeError,
        "n: expected an integer, got 100.0",
    ),
    "unknown back end": (
        lambda: ak.requantize_sum([data()], data(), n=N, backend="gpu", **FORM),
        ValueError,
        "backend: expected None or one of",
    ),
    "norm": (
        lambda: ak.pack_signs(floats(), data(SIGNS), norm="max"),
        ValueError,
        r"pack_signs: norm: expected one of \('l2', 'l1'\), got 'max'",
    ),
    "error dtype": (
        lambda: ak.pack_signs(floats(), data(SIGNS), error=floats().half()),
        TypeError,
        "error: expected torch.float32, got torch.float16",
    ),
    "error size": (
        lambda: ak.pack_signs(floats(), data(SIGNS), error=floats(N - 1)),
        ValueError,
        "error: expected 100 elements, as many as src, got 99",
    ),
    "signs, size": (
        lambda: ak.pack_signs(floats(), data(SIGNS + 1)),
        ValueError,
        r"out: expected 17 bytes \(100 signs and their scale\), got 18",
    ),
    "mean of none": (
        lambda: ak.mean_signs([], floats()),
        ValueError,
        "mean_signs: sources: expected at least one",
    ),
    "sign_bytes": (lambda: ak.sign_bytes(-3), ValueError, "sign_bytes: n: expected at least 0, got -3"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case: str) -> None:
    call, error, text = CASES[case]
    with pytest.raises(error, match=text) as caught:
        call()
    assert isinstance(caught.value, ak.AccelKernelsError)


def test_nothing_is_written() -> None:
    out, error = data(SIGNS), floats()
    with pytest.raises(ValueError, match="norm"):
        ak.pack_signs(floats(), out, error=error, norm="max")
    assert (out == 7).all()
    assert (error == 1).all()


def test_sources_may_share_memory() -> None:
    message = data()
    ak.quantize_blocks(floats(), message, **FORM)
    out = floats()
    ak.dequantize_sum([message, message], out, **FORM)
    assert torch.allclose(out, torch.full((N,), 2.0))


def test_autograd_notices() -> None:
    x = floats().requires_grad_()
    version = x._version
    message = data(SIGNS)
    ak.pack_signs(floats(), message)
    ak.unpack_signs(message, x)
    assert x._version > version


def test_inference_mode() -> None:
    with torch.inference_mode():
        out, message = floats(), data(SIGNS)
        ak.pack_signs(floats(), message)
        ak.unpack_signs(message, out)
        assert torch.equal(out, floats())


@pytest.mark.parametrize("backend", [None, "portable", "reference"])
def test_nothing_to_do(backend: str | None) -> None:
    none, message = floats(0), data(0)
    for bits in (8, 4):
        form: dict[str, Any] = {"bits": bits, "backend": backend}
        ak.quantize_blocks(none, message, **form)
        ak.dequantize_blocks(message, none, **form)
        ak.dequantize_sum([message, message], none, **form)
        ak.requantize_sum([message], data(0), n=0, **form)
    ak.pack_signs(none, message, error=floats(0), backend=backend)
    ak.mean_signs([message, message], none, backend=backend)
