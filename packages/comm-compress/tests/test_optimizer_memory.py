"""Live bytes of the optimizers' state, phase by phase, against the tables in their docstrings."""

from __future__ import annotations

import gc
import logging
from typing import Any

import comm_compress as cc
import pytest
import torch
from comm_compress.optimizers.footprint import state_bytes
from optimizer_models import BUILD
from torch import nn
from zero_core.testing import run_ranks

NUMEL, PARAMS = 10_000, 12
BUCKET = 2 * NUMEL  # elements: six buckets
FREEZE = {"freeze_step": 3}
INTERVALS = {"var_freeze_step": 3, "var_update_scaler": 1, "local_step_scaler": 2, "local_step_clipper": 4}


def live_bytes() -> int:
    """Of the memory under all tensors of this process, each once."""
    gc.collect()
    with_storage: dict[int, int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            storage = item.untyped_storage()
            with_storage[storage.data_ptr()] = storage.nbytes()
    return sum(with_storage.values())


def measure(rank: int, kind: str, dtype: torch.dtype, more: dict[str, Any]) -> list[float]:
    """State bytes a parameter, early and late; without the one bucket of scratch."""
    logging.disable()
    try:
        return measured(rank, kind, dtype, more)
    finally:
        logging.disable(logging.NOTSET)  # the process runs other tests after this one


def measured(rank: int, kind: str, dtype: torch.dtype, more: dict[str, Any]) -> list[float]:
    params = [nn.Parameter(torch.full((NUMEL,), 0.5, dtype=dtype)) for _ in range(PARAMS)]
    generator = torch.Generator().manual_seed(rank)
    noise = torch.empty(NUMEL, dtype=dtype)
    for param in params:
        param.grad = torch.zeros_like(param)
    before = live_bytes()
    optimizer = BUILD[kind](params, compression=cc.Compression(bucket_bytes=4 * BUCKET), **more)
    found = []
    for step in range(1, 13):
        for param in params:
            assert param.grad is not None
            param.grad.copy_(noise.normal_(generator=generator))
        optimizer.step()
        if step in (2, 12):
            scratch = 0 if optimizer._scratch is None else optimizer._scratch.nbytes
            found.append((live_bytes() - before - scratch) / (NUMEL * PARAMS))
    return found


def close(found: list[float], want: tuple[float, float]) -> bool:
    return all(abs(one - other) <= 0.02 * other + 0.05 for one, other in zip(found, want, strict=True))


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("world", [1, 3])
def test_one_bit_adam(low: int, dtype: torch.dtype, world: int) -> None:
    for found in run_ranks(measure, world, "OneBitAdam", dtype, FREEZE):
        assert close(found, (8 + low, 8 + low + 4 + 4 / world))
        assert close(found, state_bytes("OneBitAdam", world, low=low > 0))
    for found in run_ranks(measure, world, "OneBitAdam", dtype, {**FREEZE, "shard": True}):
        assert close(found, (12 / world, 8 + low + 4 + 4 / world))
        assert close(found, state_bytes("OneBitAdam", world, low=low > 0, shard=True))


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.float16)])
def test_one_bit_lamb(low: int, dtype: torch.dtype) -> None:
    for found in run_ranks(measure, 2, "OneBitLamb", dtype, FREEZE):
        assert close(found, (8 + low, 12 + low + 4 + 4 / 2))
        assert close(found, state_bytes("OneBitLamb", 2, low=low > 0))
    for found in run_ranks(measure, 2, "OneBitLamb", dtype, {**FREEZE, "shard": True}):
        assert close(found, (12 / 2, 12 + low + 4 + 4 / 2))
        assert close(found, state_bytes("OneBitLamb", 2, low=low > 0, shard=True))


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.bfloat16)])
def test_zero_one_adam(low: int, dtype: torch.dtype) -> None:
    for found in run_ranks(measure, 2, "ZeroOneAdam", dtype, INTERVALS):
        # While the variance is updated; frozen, with drift and what ranks have in common.
        assert close(found, (12 + low + 4 + 4 / 2, 8 + 4 + 4 + 4 + 4 / 2))
        assert close(found, state_bytes("ZeroOneAdam", 2, low=low > 0))
    never_alone = {**INTERVALS, "local_step_clipper": 1}
    for found in run_ranks(measure, 2, "ZeroOneAdam", dtype, never_alone):
        assert close(found, (12 + low + 4 + 4 / 2, 8 + low + 4 + 4 / 2))
        assert close(found, state_bytes("ZeroOneAdam", 2, low=low > 0, steps_alone=False))


def test_kinds_are_named() -> None:
    with pytest.raises(
        cc.CompressConfigError, match="expected OneBitAdam, OneBitLamb or ZeroOneAdam, got 'Adam'"
    ):
        state_bytes("Adam", 2)
