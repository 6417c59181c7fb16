"""Shared by the tests of the inference ops: the ways to run one here, and what agreement means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import accel_kernels as ak
import pytest
import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Way = tuple[str, str | None]

# What one rounding to the dtype may change, relative to the largest of the result.
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def ways() -> list[object]:
    """Every back end, the C++ one with each instruction set."""
    found: list[Way] = [*(("cpu", isa) for isa in ak.available_cpu_isas()), ("portable", None)]
    return [pytest.param(way, id=way[1] or way[0]) for way in found]


@contextlib.contextmanager
def with_way(way: Way, dtype: torch.dtype) -> Iterator[str | None]:
    """The back end to ask for within the block; None (the best) where the C++ one has no kernels for ``dtype``."""
    backend, isa = way
    if backend == "cpu" and dtype == torch.float16:
        backend = "portable"
    with ak.set_cpu_isa(isa) if isa else contextlib.nullcontext():
        yield backend


def agree(
    got: torch.Tensor, expected: torch.Tensor, num_terms: int = 1, units: float = 2.0, at_least: float = 0.0
) -> None:
    """Equal but for ``units`` roundings, and the order of a sum of ``num_terms``; for results of size ``at_least``.

    A sum's roundings go with its terms: for n of size 1 say ``at_least=n**0.5``, since few results may all cancel.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.numel() == 0:
        return
    largest = max(float(expected.to(torch.float32).abs().max()), at_least)
    allowed = (units * UNIT[got.dtype] + num_terms**0.5 * 2.0**-22) * largest + 1e-30
    difference = float((got.to(torch.float32) - expected.to(torch.float32)).abs().max())
    assert difference <= allowed, f"off by {difference}, allowed {allowed}"
