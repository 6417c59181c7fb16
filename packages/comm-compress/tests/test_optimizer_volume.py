"""Bytes that the optimizers send, counted at torch.distributed, against the formulas."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import comm_compress as cc
import pytest
import torch
from comm_compress.optimizers.intervals import Intervals
from comm_compress.wire_1bit import run_volume, sent_1bit, sent_exact
from optimizer_models import BUILD
from torch import nn
from wire_lab import counted
from zero_core.testing import run_ranks

SIZES = [30_001, 14_000, 7, 26_003]  # buckets of 120 000 bytes: 30 001 | 14 000 + 7 | 26 003
BUCKETS = [30_001, 14_007, 26_003]
AGREEMENT = 32
STEPS = 30
INTERVALS = {"var_freeze_step": 8, "var_update_scaler": 2, "local_step_scaler": 6, "local_step_clipper": 4}


# Ranks of one machine would share memory: nothing to count.
with_messages = patch("zero_core.collectives.connect", lambda *_: None)


@with_messages
def train(rank: int, kind: str, dtype: torch.dtype, more: dict[str, Any]) -> tuple[list[int], Any]:
    """Bytes sent, by step; and what the optimizer says of it."""
    generator = torch.Generator().manual_seed(rank)
    params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES]
    optimizer = BUILD[kind](params, compression=cc.Compression(bucket_bytes=120_000), **more)
    sent = []
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        with counted() as messages:
            optimizer.step()
        sent.append(sum(messages))
    return sent, cc.traffic(optimizer)


def exact(world: int, itemsize: int) -> int:
    return sum(sent_exact(size, world, itemsize).total for size in BUCKETS)


def signs(world: int, rank: int) -> int:
    return sum(sent_1bit(size, world, rank).total for size in BUCKETS)


@pytest.mark.parametrize("kind", ["OneBitAdam", "OneBitLamb"])
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
@pytest.mark.parametrize("shard", [False, True])
def test_warm_up_and_compressed_steps(kind: str, world: int, dtype: torch.dtype, shard: bool) -> None:
    freeze = 5
    ranks = run_ranks(train, world, kind, dtype, {"freeze_step": freeze, "shard": shard})
    told = (world - 1) * AGREEMENT
    for rank, (sent, told_of) in enumerate(ranks):
        assert told_of.line("gradients").sent.total == freeze * exact(world, dtype.itemsize)
        assert told_of.line("signs of momenta").sent.total == (STEPS - freeze) * signs(world, rank)
        assert told_of.line("signs of momenta").ratio == pytest.approx(8 * dtype.itemsize, rel=0.01)
        assert told_of.line("signs of momenta").codec_s > 0
        assert told_of.total.plain.total == STEPS * exact(world, dtype.itemsize)
        moments = sum(
            (world - 1) * 3 * 4 * -(-size // world) for size in BUCKETS
        )  # 12 bytes a parameter, once
        assert told_of.line("state at the freeze").sent.total == (moments if shard else 0)
        for step in range(2, STEPS + 1):  # the first also compares parameters, and names the optimizer
            if step > freeze:
                assert sent[step - 1] == signs(world, rank) + told
                ratio = exact(world, dtype.itemsize) / signs(world, rank)
                assert ratio == pytest.approx(8 * dtype.itemsize, rel=0.01)  # 32 or 16 times less
            elif not shard:
                assert sent[step - 1] == exact(world, dtype.itemsize) + told
            elif step < freeze:  # norms besides; at the freeze moments are gathered
                norms = (16 + (2 * 8 * len(SIZES) if kind == "OneBitLamb" else 0)) * (world - 1)
                assert sent[step - 1] == exact(world, dtype.itemsize) + told + norms


@with_messages
def widened(rank: int, shard: bool) -> None:
    """Gradients and parameters of different widths on the wire, and a step that is begun and given up."""
    params = [nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in SIZES]
    wide = cc.Compression(bucket_bytes=120_000, reduce_dtype=torch.float32)
    optimizer = cc.OneBitAdam(params, freeze_step=50, shard=shard, compression=wide)
    for step in range(4):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + rank)
        before = cc.traffic(optimizer).total.sent.total
        with counted() as messages:
            optimizer.clip_grad_norm(1.0)
            if step != 2:
                optimizer.step()
            else:
                optimizer.zero_grad()
        if step == 2 and shard:
            continue  # parameters were not gathered; counted as if they were
        if step:  # the first names the optimizer besides
            sent = cc.traffic(optimizer).total.sent.total - before
            assert sum(messages) - sent == AGREEMENT + (16 if shard else 0)  # the norm
            half = sum(-(-size // 2) for size in BUCKETS)
            assert sent == half * (4 + (2 if shard else 4))


@pytest.mark.parametrize("shard", [False, True])
def test_what_travels_in_another_dtype_is_counted_as_such(shard: bool) -> None:
    run_ranks(widened, 2, shard)


@pytest.mark.parametrize("world", [2, 3])
def test_zero_one_adam_follows_its_schedule(world: int) -> None:
    policy = Intervals(**INTERVALS)
    updates, syncs = set(policy.variance_steps(STEPS)), set(policy.sync_steps(STEPS))
    assert len(updates | syncs) < 0.8 * STEPS
    told = (world - 1) * AGREEMENT
    ranks = run_ranks(train, world, "ZeroOneAdam", torch.bfloat16, INTERVALS)
    for rank, (sent, told_of) in enumerate(ranks):
        assert told_of.line("nothing").calls == STEPS - len(updates | syncs)
        assert told_of.line("nothing").ratio == float("inf")
        for step in range(2, STEPS + 1):
            want = 0  # not a byte
            if step in updates:
                want = exact(world, 2) + told
            elif step in syncs:
                want = signs(world, rank) + told
            assert sent[step - 1] == want, step
        run = run_volume(BUCKETS, world, 2, num_steps=STEPS, exact_steps=updates, sync_steps=syncs, rank=rank)
        assert sum(sent) == pytest.approx(run.sent_bytes, rel=0.01)
        assert told_of.total.sent.total == run.sent_bytes
        assert told_of.total.ratio == pytest.approx(run.ratio)
