"""Inside `last_backward` the exact step begins as units are reduced: the same bits; a broken promise is an error."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
from store_faults import FaultyEngine
from stored_models import AllUsed, Net, batch, build, loss_of, stores
from test_nvme_on_the_way import HoldingEngine
from test_speculation import assert_same, state_of
from zero_core import ZeroStateError
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, NvmeStore, OffloadConfigError, OffloadedOptimizer


def last(model, opt, step: int, rank: int, accumulate: int) -> None:
    for micro in range(accumulate):
        loss = loss_of(model, batch(step * accumulate + micro, rank))
        if micro == accumulate - 1 and isinstance(opt, OffloadedOptimizer):
            before = zero.full_state_dict(model)
            with opt.last_backward():
                loss.backward()
            # The model computes with old values until `step`.
            assert_same(zero.full_state_dict(model), before)
        else:
            loss.backward()


def parity(rank: int, stage: int, dtype: torch.dtype, accumulate: int, folder: str) -> None:
    for net, num_units in ((AllUsed, 5), (Net, 1)):
        states = []
        for kind, what in (("none", ""), ("host", "all"), ("host", "optimizer"), ("nvme", "all")):
            model, opt = build(stores(kind, what, stage, folder), stage, dtype, net=net)
            for step in range(4):
                last(model, opt, step, rank, accumulate)
                if kind != "none":
                    assert opt.early_steps.begun == step * num_units
                    assert float(zero.grad_norm(opt)) > 0  # may be asked for
                opt.step()
                opt.zero_grad()
                for group in opt.param_groups:
                    group["lr"] *= 0.9
            states.append(state_of(model, opt))
            assert_same(states[-1], states[0], (net, kind, what))


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulate"),
    [(1, torch.float32, 1), (2, torch.bfloat16, 3), (3, torch.float32, 1), (3, torch.bfloat16, 3)],
)
def test_bit_for_bit(tmp_path, stage: int, dtype: torch.dtype, accumulate: int) -> None:
    run_ranks(parity, 2, stage, dtype, accumulate, str(tmp_path))


def promise(rank: int) -> None:
    """Whatever breaks it is told, where it can be before anything is lost."""

    def begun():
        model, opt = build(HostStore(), 2, torch.bfloat16, world=1, net=AllUsed)
        for step in range(2):
            last(model, opt, step, rank, 1)
            opt.step()
            opt.zero_grad()
        last(model, opt, 2, rank, 1)
        return model, opt

    model, opt = begun()
    expected = begun()
    for call in (
        lambda: zero.clip_grad_norm(opt, 1.0),
        opt.zero_grad,
        opt.state_dict,
        lambda: zero.sharded_state(model, opt),
        lambda: opt.last_backward().__enter__(),
    ):
        with pytest.raises(ZeroStateError, match=r"5 units have been stepped.*call step\(\) first"):
            call()
    for _, its in ((model, opt), expected):
        its.step()
        its.zero_grad()
    assert_same(state_of(model, opt), state_of(*expected))

    def again(model, opt) -> None:
        loss_of(model, batch(9, rank)).backward()

    def edit(model, opt) -> None:
        with torch.no_grad():
            model.blocks[0].up.weight.add_(1.0)

    def rate(model, opt) -> None:
        opt.param_groups[0]["lr"] = 1.0

    def forget(model, opt) -> None:
        model.zero_grad()

    for break_it, what in ((again, "gradient"), (edit, "edits"), (rate, "rates"), (forget, "gradient")):
        model, opt = begun()
        break_it(model, opt)
        for _ in range(2):
            with pytest.raises(ZeroStateError, match=f"has changed: {what}.*from a checkpoint"):
                opt.step()
    with pytest.raises(ZeroStateError, match=r"has changed: gradient.*from a checkpoint"):
        opt.close()


def test_a_broken_promise_is_an_error() -> None:
    run_ranks(promise, 1)


def refusals(rank: int) -> None:
    model, opt = build(HostStore(), 2, world=1)
    loss_of(model, batch(0, rank)).backward()
    zero.clip_grad_norm(opt, 1.0)
    with pytest.raises(ZeroStateError, match="to be clipped"), opt.last_backward():
        pass
    model, opt = build(HostStore(), 2, world=1, scaler=zero.LossScaler(8.0, dynamic=False))
    with pytest.raises(ZeroStateError, match="a scaler may skip"), opt.last_backward():
        pass
    model, opt = build(HostStore(), 2, world=1, overlap="speculative")
    with pytest.raises(ZeroStateError, match="finds out by itself"), opt.last_backward():
        pass
    model, opt = build(zero.Stores(optimizer=HostStore(), optimizer_ratio=0.0), 2, world=1)
    with pytest.raises(OffloadConfigError, match="no optimizer state"), opt.last_backward():
        pass


def test_refusals() -> None:
    run_ranks(refusals, 1)


def fails(rank: int, folder: str) -> None:
    """An error in the thread is told again and again, until a checkpoint is loaded."""
    engine = FaultyEngine()
    store = zero.Stores(optimizer=NvmeStore(folder, engine=engine))
    model, opt = build(store, 2, torch.bfloat16, world=1, net=AllUsed)
    for step in range(2):
        last(model, opt, step, rank, 1)
        opt.step()
        opt.zero_grad()
    saved, expected = copy.deepcopy(opt.state_dict()), state_of(model, opt)
    engine.arm("read", at=7)
    last(model, opt, 2, rank, 1)
    for call in (opt.step, opt.step, opt.state_dict):
        with pytest.raises(OSError, match="Input/output error"):
            call()
    opt.load_state_dict(saved)
    assert_same(state_of(model, opt), expected)
    opt.zero_grad()
    plain, its = build(None, 2, torch.bfloat16, world=1, net=AllUsed)
    for each, own, begin in ((plain, its, 0), (model, opt, 2)):
        for step in range(begin, 4):
            last(each, own, step, rank, 1)
            own.step()
            own.zero_grad()
    assert_same(state_of(model, opt), state_of(plain, its))


def test_an_error_in_the_thread(tmp_path) -> None:
    run_ranks(fails, 1, str(tmp_path))


def waits_for_no_gradient(rank: int, folder: str) -> None:
    states = []
    for held in (False, True):
        engine = HoldingEngine()
        engine.may_end.set()
        grads = NvmeStore(folder, engine=engine)
        model, opt = build(zero.Stores(grads=grads, optimizer=HostStore()), 2, world=1, net=AllUsed)
        for step in range(3):
            if held and step:
                engine.may_end.clear()
            with opt.last_backward():
                loss_of(model, batch(step, rank)).backward()
            assert opt.early_steps.begun == step * 5
            if not engine.may_end.is_set():
                opt._early.early.finish()  # the thread has them from memory, too
                engine.may_end.set()
            opt.step()
            opt.zero_grad()
        states.append(state_of(model, opt))
        opt.close()
        engine.close()
    assert_same(states[1], states[0])


def test_gradients_on_their_way_to_a_drive_are_not_waited_for(tmp_path) -> None:
    run_ranks(waits_for_no_gradient, 1, str(tmp_path))
