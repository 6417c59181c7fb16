"""What has failed leaves things as they were: asked again, with room or whole values, it works."""

from __future__ import annotations

import collections
import copy
import logging

import accel_kernels as ak
import pytest
import torch
import zero_core as zero
import zero_offload_nvme as off
from store_faults import FaultyEngine
from stored_models import AllUsed, Net, batch, build, loss_of, train
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme import nvme_store, window

# -- no room ------------------------------------------------------------------------------------------------------


def shard(net, store, world: int, *, stage: int = 3, dtype: torch.dtype = torch.float32):
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    return zero.shard(net, mesh, stage=stage, precision=zero.Precision(compute=dtype), store=store)


def shard_again(rank: int, world: int, kind: str, folder: str) -> None:
    """There is room for some units; on the last rank alone there is too little."""

    def store(limit_bytes: int | None):
        if kind == "host":
            return off.HostStore(limit_bytes=limit_bytes)
        return off.NvmeStore(folder, limit_bytes=limit_bytes)

    torch.manual_seed(0)
    net = Net()
    before = copy.deepcopy(net.state_dict())
    small = store(60_000 // world if rank == world - 1 else None)
    if rank == world - 1:
        with pytest.raises((off.OffloadDiskError, off.OffloadMemoryError)):
            shard(net, small, world)
    else:
        with pytest.raises(zero.CollectiveError, match=r"another rank's store has no room"):
            shard(net, small, world)
    assert small.used_bytes == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    model = shard(net, store(None), world)
    found = zero.full_state_dict(model)
    assert all(torch.equal(value, before[name]) for name, value in found.items())


@pytest.mark.parametrize("kind", ["host", "nvme"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_model_that_finds_no_room_is_as_it_was(tmp_path, kind: str, world: int) -> None:
    run_ranks(shard_again, world, world, kind, str(tmp_path))


def masters_again(rank: int) -> None:
    losses = []
    for limited in (False, True):
        torch.manual_seed(0)
        store = off.HostStore()
        model = shard(AllUsed(), zero.Stores(optimizer=store), 1, stage=2, dtype=torch.bfloat16)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if limited:
            store.limit_bytes = 40_000
            with pytest.raises(off.OffloadMemoryError):
                off.OffloadedOptimizer(model, inner)
            store.limit_bytes = None
        losses.append(train(model, off.OffloadedOptimizer(model, inner), 0, range(3)))
    assert losses[0] == losses[1]


def test_masters_that_found_no_room() -> None:
    run_ranks(masters_again, 1)


def gradients_again(rank: int) -> None:
    losses = []
    for limited in (False, True):
        torch.manual_seed(0)
        store = off.HostStore()
        model = shard(AllUsed(), zero.Stores(grads=store), 1, stage=2)
        opt = zero.ShardedOptimizer(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        if limited:
            store.limit_bytes = 40_000
            with pytest.raises(off.OffloadMemoryError):
                loss_of(model, batch(0, 0)).backward()
            lanes = model_lanes(model)
            assert any(lane.shard.value is None for lane in lanes), "nothing is there that is not"
            store.limit_bytes = None
            opt.zero_grad()
        losses.append(train(model, opt, 0, range(3)))
    assert losses[0] == losses[1]


def model_lanes(model):
    return list(zero.sharded(model).reducer.lanes)


def test_gradients_that_found_no_room() -> None:
    run_ranks(gradients_again, 1)


# -- values that were not written ---------------------------------------------------------------------------------


def loaded_again(rank: int, folder: str, dtype: torch.dtype) -> None:
    """An error of the drive in a step, and on from what was saved, with the same optimizer and store."""
    model, opt = build(None, 3, dtype, world=1)
    train(model, opt, 0, range(4), clip=None)
    expected = zero.full_state_dict(model)
    for at in range(0, 30, 3):
        engine = FaultyEngine()
        model, opt = build(off.NvmeStore(folder, engine=engine), 3, dtype, world=1)
        train(model, opt, 0, range(2), clip=None)
        saved = {name: each.local.clone() for name, each in zero.sharded_state(model, opt).items()}
        scalars = copy.deepcopy(zero.optimizer_scalars(opt))
        loss_of(model, batch(2, 0)).backward()
        engine.arm("write", at)
        try:
            opt.step()
            loss_of(model, batch(3, 0)).backward()
            opt.step()
        except (ak.TransferError, zero.CollectiveError):
            pass
        if not engine.hits:
            assert at, "no write was met"
            return
        opt.zero_grad()
        zero.load_sharded_state(model, opt, saved)
        zero.load_optimizer_scalars(opt, scalars)
        train(model, opt, 0, range(2, 4), clip=None)
        found = zero.full_state_dict(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected), at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_replaces_what_could_not_be_written(tmp_path, dtype: torch.dtype) -> None:
    run_ranks(loaded_again, 1, str(tmp_path), dtype)


# -- begun anew ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["host", "nvme"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_is_closed_empties_its_stores(tmp_path, stage: int, kind: str) -> None:
    run_ranks(closed, 1, stage, kind, str(tmp_path))


def closed(rank: int, stage: int, kind: str, folder: str) -> None:
    store = off.HostStore() if kind == "host" else off.NvmeStore(folder)
    for _ in range(2):
        model, opt = build(store, stage, torch.bfloat16, world=1)
        train(model, opt, 0, range(2))
        assert store.used_bytes > 0
        opt.close()
        zero.sharded(model).close()
        assert store.used_bytes == 0, sorted(getattr(store, "_tensors", {}))


def test_a_state_that_is_assigned() -> None:
    """As plain torch code does to begin anew."""
    found = []
    for made in (off.CPUAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(9)) for _ in range(2)]
        opt = made(params, lr=0.1)
        for step in range(6):
            if step == 3:
                opt.state = collections.defaultdict(dict)
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            opt.step()
        assert len(opt.state_dict()["state"]) == 2
        found.append(torch.cat([param.detach() for param in params]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_a_group_that_is_taken_away() -> None:
    """Its state stays in `state`, as torch has it; nobody steps it."""
    found = []
    for made in (off.CPUAdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        first, late, gone = (torch.nn.Parameter(torch.randn(5)) for _ in range(3))
        opt = made([{"params": [gone], "lr": 0.5}, {"params": [first, late], "lr": 0.1}])
        for step in range(4):
            if step == 2:
                opt.param_groups.pop(0)
            for param in (first, gone, *([late] if step >= 2 else [])):
                param.grad = torch.sin(param.detach() * (step + 1))
            opt.step()
        found.append(torch.cat([param.detach() for param in (first, late, gone)]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def first_moves_early(rank: int) -> None:
    """A parameter whose first gradient comes in `last_backward` makes its first step there: undamped."""
    runs = []
    for early in (False, True):
        torch.manual_seed(0)
        model, opt = build(
            off.HostStore(), 2, world=1, net=TwoParts,
            make=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
        )  # fmt: skip
        for step in range(4):
            loss = model(batch(step, 0).float(), both=step >= 2)
            if early and step >= 2:
                with opt.last_backward():
                    loss.backward()
            else:
                loss.backward()
            opt.step()
            opt.zero_grad()
        runs.append(zero.full_state_dict(model))
    assert opt.early_steps.committed > 0
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class TwoParts(torch.nn.Module):
    """One unit, of which a part is used later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, *, both: bool) -> torch.Tensor:
        y = self.first(x / 61)
        return (y + self.late(x / 61) if both else y).square().mean()


def test_a_first_step_during_backward_is_not_damped() -> None:
    run_ranks(first_moves_early, 1)


# -- what no kernel does, and what cannot be measured --------------------------------------------------------------


def in_fp64(rank: int) -> None:
    for net, precision, message in (
        (Net().double(), zero.Precision(), "masters of torch.float64"),
        (Net(), zero.Precision(accumulate=torch.float64), "gradients of torch.float64"),
    ):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        model = zero.shard(net, mesh, stage=2, precision=precision)
        with pytest.raises(off.OffloadConfigError, match=message):
            off.OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()))


def test_fp64_is_refused_before_a_step() -> None:
    run_ranks(in_fp64, 1)


def test_a_folder_that_cannot_be_measured_is_used_all_the_same(tmp_path, monkeypatch, caplog) -> None:
    def tune(*args: object, **options: object) -> None:
        raise ak.TransferError(28, "no room to measure with")

    monkeypatch.setattr(nvme_store.ak, "tune", tune)
    with caplog.at_level(logging.WARNING), off.NvmeStore(tmp_path, tune_s=0.1) as store:
        store.put("x", torch.ones(5)).wait()
        assert torch.equal(store.view("x"), torch.ones(5))
    assert "not tuned: no room to measure with" in caplog.text


def test_a_window_has_no_memory_for_what_does_not_pass_through(monkeypatch) -> None:
    made: list[int] = []
    empty = ak.aligned_empty
    monkeypatch.setattr(
        window.ak, "aligned_empty", lambda nbytes, **more: made.append(nbytes) or empty(nbytes, **more)
    )
    room = window._Room(4096, pin=False, engine=None)
    room.buffer(3, 10, torch.float32)
    room.buffer(2, 10, torch.float32)
    room.buffer(3, 20, torch.float32)
    assert made == [4096, 4096]
