"""Overflows stay out of sums, errors of the thread are met at the next call, edits count, `close` ends the thread."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import zero_core as zero
from stored_models import batch, build, loss_of, train
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, NvmeStore, OffloadStateError, ZenFlow

POLICY = ZenFlow(topk_ratio=0.1, update_interval=2, select_strategy="step", select_interval=4)


def scaled(rank: int, poison: int | None):
    """Six finite steps under a static scale; before step `poison`, one whose gradients overflow."""
    scaler = zero.LossScaler(1024.0, dynamic=False)
    model, opt = build(HostStore(), 2, zenflow=POLICY, scaler=scaler)
    for step in range(6):
        for bad in (True, False) if step == poison else (False,):
            loss = scaler.scale(loss_of(model, batch(step, rank)))
            (loss * float("inf") if bad else loss).backward()
            opt.step()
            assert opt.last_step_skipped == bad
            opt.zero_grad()
    opt.flush()
    opt.close()
    return zero.full_state_dict(model)


def overflows(rank: int) -> None:
    clean = scaled(rank, None)
    for poison in (0, 1, 2, 3):
        state = scaled(rank, poison)
        assert all(torch.equal(state[name], clean[name]) for name in clean), poison


def test_an_overflow_enters_no_window() -> None:
    run_ranks(overflows, 2)


def dies(rank: int) -> tuple[str, float]:
    """The second rank ends with a step begun, whose values the first one's thread then waits for."""
    model, opt = build(HostStore(), 2, zenflow=POLICY, timeout_s=4.0)
    train(model, opt, rank, range(3))
    if rank == 1:
        opt._zenflow._late.arrive = lambda *_: os._exit(17)
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(zero.CollectiveError) as caught:
            train(model, opt, rank, range(3, 5))
    return str(caught.value), time.monotonic() - begun


def test_a_rank_that_dies_before_its_values_are_sent() -> None:
    results = run_ranks(dies, 2, tolerate=(1,), timeout_s=60)
    message, seconds = results[0]
    assert "rank 1" in message
    assert seconds < 16
    assert "exit code 17" in results[1]


class Failing(NvmeStore):
    """A drive that fails when it is told to."""

    fails = False

    def put(self, name, values, start=0):
        if self.fails and name.endswith("exp_avg"):
            raise OSError(5, f"no more room for {name}")
        return super().put(name, values, start)


@pytest.mark.parametrize("call", ["step", "flush", "state_dict", "sharded_state", "close"])
def test_an_error_in_the_thread_is_met_at_the_next_call(tmp_path, call: str) -> None:
    run_ranks(failing, 1, call, str(tmp_path))


def failing(rank: int, call: str, folder: str) -> None:
    store = Failing(folder)
    model, opt = build(zero.Stores(optimizer=store), 2, world=1, zenflow=POLICY)
    train(model, opt, rank, range(3))
    opt._zenflow._late.wait()
    store.fails = True
    train(model, opt, rank, range(3, 4))  # ends a window: a thread begins to step the rest
    loss_of(model, batch(4, rank)).backward()
    opt._zenflow._late._late._future.exception(timeout=30)
    calls = {
        "step": opt.step,
        "flush": opt.flush,
        "state_dict": opt.state_dict,
        "sharded_state": lambda: zero.sharded_state(model, opt),
        "close": opt.close,
    }
    for again in (call, call, "step"):
        with pytest.raises(OSError, match=r"no more room for .*exp_avg"):
            calls[again]()


def threads(rank: int) -> None:
    def running() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name.startswith("zenflow")]

    model, opt = build(HostStore(), 2, world=1, zenflow=POLICY)
    assert not running()
    with opt:
        train(model, opt, rank, range(4))
        assert len(running()) == 2
    assert not running()
    opt.close()
    opt.flush()  # needs none
    assert opt.state_dict()["inner"]["state"]
    loss_of(model, batch(4, rank)).backward()
    with pytest.raises(OffloadStateError, match="closed"):
        opt.step()


def test_close_ends_the_thread() -> None:
    run_ranks(threads, 1)


def edits(rank: int, stage: int, dtype: torch.dtype, whole: bool) -> None:
    """New values for the parameters, while the old ones' update is under way."""
    model, opt = build(HostStore(), stage, dtype, zenflow=POLICY)
    train(model, opt, rank, range(4))
    assert opt._zenflow._late._late is not None
    wanted = {name: torch.full_like(value, 0.25) for name, value in zero.full_state_dict(model).items()}
    if whole:
        zero.load_full_state_dict(model, wanted)
    else:
        zero.set_full(model, "blocks.1.up.weight", wanted["blocks.1.up.weight"], optimizer=opt)
    for group in opt.param_groups:
        group["lr"] = 0.0
    train(model, opt, rank, range(4, 9))
    state = zero.full_state_dict(model)
    for name in wanted if whole else ["blocks.1.up.weight"]:
        assert torch.equal(state[name], wanted[name]), name
    opt.close()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [2, 3])
def test_edits_count(stage: int, dtype: torch.dtype, whole: bool) -> None:
    run_ranks(edits, 2, stage, dtype, whole)


def kept(rank: int) -> None:
    """A gradient that the thread still reads is left alone by the next backward, zeroed or not."""
    states = []
    for set_to_none in (True, False):
        model, opt = build(
            HostStore() if set_to_none else zero.Stores(optimizer=HostStore()), 2, zenflow=POLICY
        )
        for step in range(6):
            loss_of(model, batch(step, rank)).backward()
            opt.step()
            opt.zero_grad(set_to_none=set_to_none)
        states.append(zero.full_state_dict(model))
        opt.close()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_lent_gradients() -> None:
    run_ranks(kept, 2)


def unused(rank: int, overlap: bool) -> None:
    """Blocks that are left out of some steps: what they have gathered is applied at the end of the window."""
    policy = ZenFlow(topk_ratio=0.1, update_interval=3, overlap_step=overlap)
    model, opt = build(HostStore(), 2, zenflow=policy)
    blocks = model.blocks
    for step in range(9):
        x = model.embed(batch(step, rank))
        for number, block in enumerate(blocks):
            if number != step % 3:
                x = block(x)
        model.head(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.flush()
    state = zero.full_state_dict(model)
    assert all(torch.isfinite(value).all() for value in state.values())
    opt.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_parts_may_rest(overlap: bool) -> None:
    run_ranks(unused, 2, overlap)
