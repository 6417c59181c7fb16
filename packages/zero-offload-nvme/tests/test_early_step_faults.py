"""What happens between a step that began early and `step`: errors, edits, checkpoints, and any order of them."""

from __future__ import annotations

import copy
import threading
from contextlib import suppress

import pytest
import torch
import zero_core as zero
from accel_kernels import TransferError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_faults import FaultyEngine, mounted
from stored_models import batch, build, loss_of, train
from test_speculation import LOOSE, TIGHT, assert_same, state_of
from torch import nn
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, NvmeStore, OffloadDiskError, OffloadMemoryError


def backward(model, step: int, rank: int = 0) -> None:
    loss_of(model, batch(step, rank)).backward()


def fails_in_the_thread(rank: int, folder: str) -> None:
    """The error is told at the next call, nothing has changed, and the same step succeeds afterwards."""
    for what in ("read", "write"):
        for call in ("step", "state_dict", "sharded_state", "close"):
            engine = FaultyEngine()
            model, opt = build(
                zero.Stores(optimizer=NvmeStore(folder, engine=engine)),
                2,
                torch.bfloat16,
                world=1,
                overlap="speculative",
            )
            plain, its = build(None, 2, torch.bfloat16, world=1)
            for each, own in ((model, opt), (plain, its)):
                train(each, own, rank, range(3), clip=None)
            before = copy.deepcopy(state_of(model, opt))
            engine.arm(what, at=7)
            backward(model, 3)
            backward(plain, 3)
            opt._early.early.finish()
            assert engine.hits == 1
            calls = {
                "step": opt.step,
                "state_dict": opt.state_dict,
                "sharded_state": lambda model=model, opt=opt: zero.sharded_state(model, opt),
                "close": opt.close,
            }
            with pytest.raises(TransferError, match=f"{what}.*Input/output error"):
                calls[call]()
            assert_same(state_of(model, opt), before)
            if call == "close":
                continue
            opt.step()  # the same gradients
            its.step()
            for each, own in ((model, opt), (plain, its)):
                own.zero_grad()
                train(each, own, rank, range(4, 6), clip=None)
            assert_same(state_of(model, opt), state_of(plain, its), (what, call))
            assert opt.early_steps.committed > 10


def test_an_error_in_the_thread_changes_nothing(tmp_path) -> None:
    run_ranks(fails_in_the_thread, 1, str(tmp_path))


def fails_in_wait(rank: int, folder: str) -> None:
    """The same where the thread meets it while `step` already waits."""
    entered, go_on = threading.Event(), threading.Event()

    class Held(NvmeStore):
        is_held = False

        def put(self, name, values, start=0):
            if self.is_held and threading.current_thread().name.startswith("early-step"):
                entered.set()
                assert go_on.wait(30)
                raise OSError(5, f"no more room for {name}")
            return super().put(name, values, start)

    store = Held(folder)
    model, opt = build(zero.Stores(optimizer=store), 2, world=1, overlap="speculative")
    train(model, opt, rank, range(3), clip=None)
    before = copy.deepcopy(state_of(model, opt))
    store.is_held = True
    backward(model, 3)
    assert entered.wait(30)
    threading.Timer(0.2, go_on.set).start()
    with pytest.raises(OSError, match="no more room"):
        opt.step()
    store.is_held = False
    assert_same(state_of(model, opt), before)
    opt.step()
    opt.zero_grad()
    train(model, opt, rank, range(4, 6), clip=None)
    plain, its = build(None, 2, world=1)
    train(plain, its, rank, range(6), clip=None)
    assert_same(state_of(model, opt), state_of(plain, its))


def test_an_error_while_step_waits_changes_nothing(tmp_path) -> None:
    run_ranks(fails_in_wait, 1, str(tmp_path))


def full(rank: int, folder: str) -> None:
    """No room for results that wait: the first step says so before it begins, and goes on when there is."""
    for make in (lambda: NvmeStore(folder), lambda: HostStore(limit_bytes=700_000)):
        store = make()
        model, opt = build(zero.Stores(optimizer=store), 2, world=1, overlap="speculative")
        before = copy.deepcopy(zero.full_state_dict(model))
        backward(model, 0)
        with pytest.raises((OffloadDiskError, OffloadMemoryError), match=r"\.next\d+' needs"):
            opt.step()
        assert_same(zero.full_state_dict(model), before)
        assert not opt.inner.state
        store.close()


def test_a_full_store_is_met_before_the_first_step(tmp_path) -> None:
    with mounted(tmp_path / "disk", 700 << 10) as folder:
        run_ranks(full, 1, str(folder))


# -- any order of what may happen -----------------------------------------------------------------------------------

OPERATIONS = [
    "backward", "backward", "backward", "step", "step", "step", "step and zero", "step and zero", "step and zero",
    "zero", "clip loosely", "clip tightly", "overflow", "edit", "edit master", "edit state", "edit grad",
    "save", "load", "load sharded", "rate", "freeze", "unfreeze", "no sync", "wait",
]  # fmt: skip


class Small(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Run:
    """One model and its optimizer, and what was saved of them."""

    def __init__(self, store, stage: int, overlap: str | None) -> None:
        self.scaler = zero.LossScaler(64.0, growth_interval=3, at_minimum="skip")
        self.model, self.opt = build(
            store, stage, torch.bfloat16, world=1, overlap=overlap, scaler=self.scaler, net=Small
        )
        self.saved = self.sharded = None
        self.has_grad = False

    def loss(self, seed: int) -> torch.Tensor:
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return self.scaler.scale(self.model(x).float().square().mean())

    def do(self, operation: str, seed: int) -> None:
        model, opt, name = self.model, self.opt, "blocks.1.weight"
        stepped = opt.inner.state and "exp_avg" in next(iter(opt.inner.state.values()))
        if operation == "backward":
            self.loss(seed).backward()
            self.has_grad = True
        elif operation == "overflow":
            (self.loss(seed) * float("inf")).backward()
            self.has_grad = True
        elif operation == "no sync":
            with zero.no_sync(model):
                self.loss(seed).backward()
            self.has_grad = True
        elif operation.startswith("step"):
            opt.step()
            if operation == "step and zero":
                self.do("zero", seed)
        elif operation == "zero":
            opt.zero_grad(set_to_none=seed % 2 == 0)
            self.has_grad = False
        elif operation.startswith("clip"):
            zero.clip_grad_norm(opt, LOOSE if operation == "clip loosely" else TIGHT)
        elif operation == "edit":
            with zero.materialized(model, write=True):
                model.blocks[0].bias.data.add_(1.0)
        elif operation == "edit master":
            value = zero.get_full(model, name, what="master", optimizer=opt)
            zero.set_full(model, name, value * 1.5, what="master", optimizer=opt)
        elif operation == "edit state" and stepped:
            if seed % 2:
                for state in opt.inner.state.values():
                    if "exp_avg" in state:
                        state["exp_avg"].mul_(0.5)
            else:
                zero.set_full(model, name, torch.ones(9, 9), what="exp_avg", optimizer=opt)
        elif operation == "edit grad" and self.has_grad:
            with suppress(zero.ZeroStateError):  # frozen, or unused
                zero.set_full(model, name, torch.full((9, 9), 0.125), what="grad")
        elif operation == "save":
            self.saved = copy.deepcopy(opt.state_dict())
            held = zero.sharded_state(model, opt)
            self.sharded = (
                {key: shard.local.clone() for key, shard in held.items()},
                zero.optimizer_scalars(opt),
            )
        elif operation == "load" and self.saved:
            opt.load_state_dict(copy.deepcopy(self.saved))
        elif operation == "load sharded" and self.sharded:
            zero.load_sharded_state(model, opt, self.sharded[0])
            zero.load_optimizer_scalars(opt, self.sharded[1])
        elif operation == "rate":
            for group in opt.param_groups:
                group["lr"] *= 0.9
        elif operation.endswith("freeze"):
            model.blocks[2].weight.requires_grad_(operation == "unfreeze")
        elif operation == "wait" and hasattr(opt, "early_steps"):
            opt._early.early.finish()


def any_order(rank: int, stage: int, folder: str, num_examples: int) -> None:
    total = {"committed": 0, "discarded": 0}

    checks = list(HealthCheck)

    @settings(max_examples=num_examples, deadline=None, derandomize=True, suppress_health_check=checks)
    @given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 99)), min_size=10, max_size=40))
    def follow(operations) -> None:
        first = [
            ("backward", 1),
            ("step and zero", 0),
            ("backward", 2),
            ("step and zero", 0),
            ("backward", 3),
        ]
        with HostStore() as host, NvmeStore(folder) as drive:
            runs = [Run(None, stage, None), Run(host, stage, "speculative"), Run(drive, stage, "speculative")]
            for operation, seed in [*first, *operations, ("step", 0)]:
                for run in runs:
                    run.do(operation, seed)
            states = [state_of(run.model, run.opt) for run in runs]
            for run, state in zip(runs[1:], states[1:], strict=True):
                assert_same(state, states[0])
                total["committed"] += run.opt.early_steps.committed
                total["discarded"] += run.opt.early_steps.discarded
                run.opt.close()

    follow()
    assert total["committed"] > total["discarded"] > num_examples


@pytest.mark.parametrize("stage", [2, 3])
def test_any_order_of_calls(tmp_path, stage: int) -> None:
    run_ranks(any_order, 1, stage, str(tmp_path), 25)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_order_of_many_calls(tmp_path, stage: int) -> None:
    run_ranks(any_order, 1, stage, str(tmp_path), 300, timeout_s=600)
