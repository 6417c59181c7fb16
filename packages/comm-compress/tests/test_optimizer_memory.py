"""Live bytes of the optimizers' state, phase by phase, against the tables in their docstrings."""

from __future__ import annotations

import gc
import logging
from typing import Any

import comm_compress as cc
import pytest
import torch
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


def close(found: float, want: float) -> bool:
    return abs(found - want) <= 0.02 * want + 0.05


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("world", [1, 3])
def test_one_bit_adam(low: int, dtype: torch.dtype, world: int) -> None:
    for found in run_ranks(measure, world, "OneBitAdam", dtype, FREEZE):
        assert close(found[0], 8 + low)
        assert close(found[-1], 8 + low + 4 + 4 / world)
    for found in run_ranks(measure, world, "OneBitAdam", dtype, {**FREEZE, "shard": True}):
        assert close(found[0], 12 / world)
        assert close(found[-1], 8 + low + 4 + 4 / world)


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.float16)])
def test_one_bit_lamb(low: int, dtype: torch.dtype) -> None:
    for found in run_ranks(measure, 2, "OneBitLamb", dtype, FREEZE):
        assert close(found[0], 8 + low)
        assert close(found[-1], 12 + low + 4 + 4 / 2)
    for found in run_ranks(measure, 2, "OneBitLamb", dtype, {**FREEZE, "shard": True}):
        assert close(found[0], 12 / 2)
        assert close(found[-1], 12 + low + 4 + 4 / 2)


@pytest.mark.parametrize(("low", "dtype"), [(0, torch.float32), (4, torch.bfloat16)])
def test_zero_one_adam(low: int, dtype: torch.dtype) -> None:
    for found in run_ranks(measure, 2, "ZeroOneAdam", dtype, INTERVALS):
        assert close(found[0], 12 + low + 4 + 4 / 2)  # the variance is updated
        assert close(found[-1], 8 + 4 + 4 + 4 + 4 / 2)  # frozen: drift, and what ranks have in common
    never_alone = {**INTERVALS, "local_step_clipper": 1}
    for found in run_ranks(measure, 2, "ZeroOneAdam", dtype, never_alone):
        assert close(found[-1], 8 + low + 4 + 4 / 2)
