"""The engine's losses are those of DistributedDataParallel, at every stage and with accumulation."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
import zerostack
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from zero_core.testing import run_ranks
from zerostack import schedules
from zerostack_models import Small, batch, config

STEPS, ACCUMULATION = 4, 2
SCHEDULE = {"warmup_max_lr": 0.01, "warmup_num_steps": 3, "total_num_steps": 9, "warmup_type": "linear"}


def ddp_losses(rank, world, kind=torch.optim.AdamW):
    model = DistributedDataParallel(Small())
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = schedules.WarmupDecayLR(optimizer, **SCHEDULE)
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            loss = model(batch(step * ACCUMULATION + micro, rank))
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
        norms.append(float(clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return losses, norms


def unclipped(rank, world):
    """A configuration without "gradient_clipping" clips nothing, as without an engine."""
    plain = DistributedDataParallel(Small())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    raw = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    engine = zerostack.initialize(model=Small(), config=raw | {"zero_optimization": {"stage": 1}})[0]
    silent = {"zero_optimization": {"stage": 1, "compute_grad_norm": False}}
    without_norm = zerostack.initialize(model=Small(), config=raw | silent)[0]
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        expected = plain(batch(step, rank))
        losses = [each(batch(step, rank)) for each in (engine, without_norm)]
        expected.backward()
        optimizer.step()
        for each, loss in zip((engine, without_norm), losses, strict=True):
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            each.backward(loss)
            each.step()
        norms.append(engine.get_global_grad_norm())
    assert max(norms) > 1, "clipping at 1 would have changed the losses"
    assert without_norm.get_global_grad_norm() is None


def test_nothing_is_clipped_unless_it_is_asked_for():
    run_ranks(unclipped, 2, 2)


def engine_losses(rank, stage, optimizer="AdamW", **more):
    raw = config(
        stage,
        gradient_accumulation_steps=ACCUMULATION,
        scheduler={"type": "WarmupDecayLR", "params": SCHEDULE},
        **more,
    )
    raw["optimizer"]["type"] = optimizer
    engine, _, _, _ = zerostack.initialize(model=Small(), config=raw)
    losses, norms = [], []
    for micro in range(STEPS * ACCUMULATION):
        assert engine.is_gradient_accumulation_boundary() == (micro % ACCUMULATION == ACCUMULATION - 1)
        loss = engine(batch(micro, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if engine.global_steps > len(norms):
            norms.append(engine.get_global_grad_norm())
    assert engine.global_steps == STEPS
    assert engine.micro_steps == STEPS * ACCUMULATION
    assert (
        engine.global_samples
        == STEPS * engine.train_batch_size()
        == STEPS * 2 * ACCUMULATION * engine.world_size
    )
    assert engine.skipped_steps == 0
    return losses, norms


def compare_rank(rank):
    expected, expected_norms = ddp_losses(rank, dist.get_world_size())
    assert max(expected_norms) > 0.5  # the limit is really exceeded
    for stage in range(4):
        losses, norms = engine_losses(rank, stage)
        assert losses == pytest.approx(expected, rel=1e-5), f"stage {stage}"
        assert norms == pytest.approx(expected_norms, rel=1e-4), f"stage {stage}"
    expected, _ = ddp_losses(rank, dist.get_world_size(), torch.optim.Adam)
    losses, _ = engine_losses(rank, 2, "Adam")
    assert losses != pytest.approx(expected, rel=1e-5)  # "Adam" means AdamW ...
    raw = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.1, "adam_w_mode": False}}}
    losses, _ = engine_losses_of(rank, raw)
    assert losses == pytest.approx(expected, rel=1e-5)  # ... unless adam_w_mode is false
    for stage in (1, 3):  # a performance knob changes nothing
        zero = {
            "stage": stage,
            "overlap_comm": False,
            "reduce_bucket_size": 10,
            "stage3_prefetch_bucket_size": 0,
        }
        slow, _ = engine_losses(rank, stage, zero_optimization=zero)
        assert slow == engine_losses(rank, stage)[0]
    return True


def engine_losses_of(rank, more):
    more = copy.deepcopy(more)
    section = more.pop("optimizer")
    raw = config(2, gradient_accumulation_steps=ACCUMULATION, optimizer=section)
    raw["scheduler"] = {"type": "WarmupDecayLR", "params": SCHEDULE}
    engine, _, _, _ = zerostack.initialize(model=Small(), config=raw)
    losses = []
    for micro in range(STEPS * ACCUMULATION):
        loss = engine(batch(micro, rank))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, None


def test_losses_and_norms_are_those_of_ddp_at_every_stage():
    assert run_ranks(compare_rank, 2) == [True, True]


def added_up(rank, stage, dtype):
    """The norm of many micro-batches' gradients."""
    raw = config(stage, gradient_accumulation_steps=16, bf16={"enabled": True})
    raw["data_types"] = {"grad_accum_dtype": dtype}
    engine = zerostack.initialize(model=Small(), config=raw)[0]
    for micro in range(16):
        engine.backward(engine(batch(micro, rank)))
        engine.step()
    return engine.get_global_grad_norm()


def test_gradients_are_added_up_in_the_dtype_that_was_asked_for():
    wide, narrow, sharded = (
        run_ranks(added_up, 2, *case)[0] for case in ((1, "fp32"), (1, "bf16"), (2, "fp32"))
    )
    assert abs(wide - sharded) < 0.3 * abs(
        narrow - sharded
    )  # means travel in bf16, of which one stage rounds more


def skipped(rank):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("zerostack.engine").addHandler(handler)
    engine = zerostack.initialize(model=Small(), config=config(1, bf16={"enabled": True}))[0]
    engine.backward(engine(batch(0, rank)) * float("nan"))
    engine.step()
    assert engine.skipped_steps == 1
    return len(told)


def test_a_skipped_step_is_told_once():
    assert run_ranks(skipped, 2) == [1, 0]
