"""Bytes that this rank really holds between two steps, by what they are; and what they would be without ZeRO.

In: an engine just after a backward pass. Out: numbers, counted on live memory (each allocation once).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import zero_core as zero

from .. import policies
from ..engine import Engine
from .gpt import GPT, GPTConfig

KINDS = ("parameters", "gradients", "optimizer state")


def held_bytes(engine: Engine) -> dict[str, int]:
    """What lives on this rank now."""
    state = zero.sharded(engine.module)
    params = [tensor for unit in state.units for tensor in (unit.shard, unit.full)]
    grads = [tensor for lane in state.reducer.lanes for tensor in (lane.shard.value, lane.bucket.flat)]
    masters = [unit.master for unit in state.units]
    states = [value for entry in engine.optimizer.state.values() for value in entry.values()]
    kept = _storages(params)
    return {
        "parameters": sum(kept.values()),
        "gradients": sum(_storages(grads).values()),
        "optimizer state": sum(n for at, n in _storages([*masters, *states]).items() if at not in kept),
    }


def without_zero(engine: Engine, size: GPTConfig) -> dict[str, int]:
    """What every rank would hold with everything replicated, in the same precision."""
    with torch.device("meta"):
        model = GPT(size)
    plan = zero.plan_memory(model, stage=0, world=1, precision=policies.precision(engine.config))
    return {
        "parameters": plan.params,
        "gradients": plan.grads,
        "optimizer state": plan.master + plan.optimizer,
    }


def _storages(tensors: Iterable[object]) -> dict[int, int]:
    """Bytes of each distinct allocation, by its address."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found
