"""`initialize(timeout_s=)`: a rank that does not come is an error after so long, however bytes travel."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
import zero_core as zero
import zerostack
from zero_core.testing import run_ranks
from zerostack_models import Small, config, train

QUANTIZED = {"stage": 2, "zero_quantized_gradients": True, "zero_quantized_weights": True}
ONE_BIT = {"type": "OneBitAdam", "params": {"lr": 0.01}}


def waits(rank, more):
    dist.barrier()
    engine = zerostack.initialize(model=Small(), config=config(2) | more, timeout_s=2.0)[0]
    train(engine, rank, [0])
    if rank == 1:
        time.sleep(6)
        return None
    start_s = time.monotonic()
    with pytest.raises(zero.CollectiveError, match="longer than 2 s"):
        train(engine, rank, [1])
    return time.monotonic() - start_s


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"zero_optimization": QUANTIZED},
        {"optimizer": ONE_BIT, "zero_optimization": {"stage": 0}},
    ],
    ids=["plain", "quantized", "signs"],
)
def test_a_rank_that_does_not_come_is_an_error_after_so_long(more):
    waited_s = run_ranks(waits, 2, more, timeout_s=60)[0]
    assert 1.5 < waited_s < 9  # others are asked for 2 s more where they are


def everyones(rank):
    for more in ({"zero_optimization": QUANTIZED}, {"optimizer": ONE_BIT, "zero_optimization": {"stage": 1}}):
        for given, meant in ((None, zero.Overlap().timeout_s), (77.0, 77.0)):
            engine = zerostack.initialize(model=Small(), config=config(2) | more, timeout_s=given)[0]
            found = {zero.sharded(engine.module).overlap.timeout_s}
            if engine.collectives is not None:
                found.add(engine.collectives.settings.timeout_s)
            else:
                found.add(engine.optimizer.inner.compression.timeout_s)
            assert found == {meant}


def test_one_deadline_for_all():
    run_ranks(everyones, 2)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf")])
def test_a_deadline_that_is_none_is_refused(wrong):
    with pytest.raises(zerostack.ConfigError, match="timeout_s: expected seconds above 0"):
        zerostack.initialize(model=Small(), config=config(1), timeout_s=wrong)
