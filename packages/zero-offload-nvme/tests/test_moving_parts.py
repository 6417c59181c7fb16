"""Parameters that begin or cease to move in mid-training, and states that go where they do not belong."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch
import zero_core as zero
from stored_models import build, loss_of, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, NvmeStore, OffloadedOptimizer, OffloadStateError, ZenFlow


class TwoLayers(nn.Module):
    """The second one is used when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x, both: bool):
        return self.second(self.first(x)) if both else self.first(x)


def two_layers(world: int = 1, *, params=slice(None), **options):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = zero.shard(TwoLayers(), mesh, stage=2, store=HostStore())
    inner = torch.optim.AdamW(list(model.parameters())[params], lr=1e-2)
    return model, OffloadedOptimizer(model, inner, **options)


def update(model, opt, step: int, *, both: bool, early: bool = False) -> None:
    torch.manual_seed(step)
    loss = model(torch.randn(2, 8), both).square().mean()
    if early:
        with opt.last_backward():
            loss.backward()
    else:
        loss.backward()
    opt.step()
    opt.zero_grad()


def values(model):
    return {name: value.clone() for name, value in zero.full_state_dict(model).items()}


def assert_equal(found, expected) -> None:
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong


def zen(overlap: bool, ratio: float = 0.25, interval: int = 2) -> dict[str, object]:
    policy = ZenFlow(
        topk_ratio=ratio,
        update_interval=interval,
        overlap_step=overlap,
        select_strategy="step",
        select_interval=100,
    )
    return {"overlap": "zenflow", "zenflow": policy}


# -- last_backward ------------------------------------------------------------------------------------------------


def late_comer(rank: int, added: bool) -> None:
    runs = []
    for early in (False, True):
        model, opt = two_layers(params=slice(2) if added else slice(None))
        for step in range(5):
            if step == 2 and added:
                opt.add_param_group({"params": list(model.parameters())[2:]})
            update(model, opt, step, both=step >= 2, early=early)
        runs.append(values(model))
    assert opt.early_steps.committed > 0
    assert_equal(runs[1], runs[0])


@pytest.mark.parametrize("added", [False, True], ids=["unused at first", "added later"])
def test_a_parameter_that_first_moves_breaks_no_promise(added: bool) -> None:
    run_ranks(late_comer, 1, added)


def half_done(rank: int) -> None:
    model, opt = build(HostStore(), 2, world=1)
    train(model, opt, rank, range(3), clip=None)
    saved = copy.deepcopy(opt.state_dict())
    described = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars = copy.deepcopy(zero.optimizer_scalars(opt))
    train(model, opt, rank, range(3, 5), clip=None)
    expected = values(model)

    def break_promise() -> None:
        with opt.last_backward():
            loss_of(model, torch.zeros(2, 6, dtype=torch.long)).backward()

    for load in (
        lambda: opt.load_state_dict(copy.deepcopy(saved)),
        lambda: (
            zero.load_sharded_state(model, opt, described),
            zero.load_optimizer_scalars(opt, scalars),
        ),
    ):
        break_promise()
        with pytest.raises(zero.ZeroConfigError):  # refused, and yet the steps are gone
            opt.load_state_dict(saved | {"masters": {}})
        with pytest.raises(zero.ZeroStateError, match="go on from a checkpoint"):
            opt.step()
        with pytest.raises(zero.ZeroStateError, match="go on from a checkpoint"):
            opt.state_dict()
        load()
        opt.zero_grad()
        train(model, opt, rank, range(3, 5), clip=None)
        assert_equal(values(model), expected)


def test_a_checkpoint_mends_half_done_steps_and_nothing_less_does() -> None:
    run_ranks(half_done, 1)


# -- ZenFlow ------------------------------------------------------------------------------------------------------


def resting(rank: int, world: int, overlap: bool) -> None:
    """The second layer moves once, and what waits for it is in the checkpoint."""
    runs = []
    for resumes in (False, True):
        model, opt = two_layers(world, **zen(overlap))
        shown = []
        for step in range(7):
            update(model, opt, 10 * step + rank, both=step == 0)
            if step == 0 and resumes:
                state = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
                scalars = copy.deepcopy(zero.optimizer_scalars(opt))
                model, opt = two_layers(world, **zen(overlap))
                zero.load_sharded_state(model, opt, state)
                zero.load_optimizer_scalars(opt, scalars)
            shown.append(values(model))
        opt.close()
        runs.append(shown)
    for found, expected in zip(runs[1], runs[0], strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_what_waits_for_a_parameter_without_gradients_is_resumed(world: int, overlap: bool) -> None:
    run_ranks(resting, world, world, overlap)


def all_chosen(rank: int, overlap: bool) -> None:
    runs = []
    for options in ({}, zen(overlap, ratio=1.0, interval=4)):
        model, opt = two_layers(**options)
        for step in range(9):
            update(model, opt, step, both=step > 0)
        opt.close()
        runs.append(values(model))
    assert_equal(runs[1], runs[0])


@pytest.mark.parametrize("overlap", [False, True])
def test_all_channels_chosen_is_adamw_for_one_that_moves_later_too(overlap: bool) -> None:
    run_ranks(all_chosen, 1, overlap)


def unflushed(rank: int) -> None:
    model, opt = two_layers(**zen(overlap=True))
    for step in range(3):
        update(model, opt, step, both=True)
    saved = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars = copy.deepcopy(zero.optimizer_scalars(opt))
    for options in ({}, {"overlap": "speculative"}, None):
        if options is None:
            torch.manual_seed(0)
            mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
            other = zero.shard(TwoLayers(), mesh, stage=2)
            plain = zero.ShardedOptimizer(other, torch.optim.AdamW(other.parameters(), lr=1e-2))
        else:
            other, plain = two_layers(**options)
        zero.load_sharded_state(other, plain, saved)
        zero.load_optimizer_scalars(plain, scalars)
        before = values(other)
        with pytest.raises(zero.ZeroStateError, match=r"first.weight.*unfinished.*flush\(\)"):
            update(other, plain, 3, both=True)
        assert_equal(values(other), before)


def test_a_state_with_updates_that_wait_is_refused_by_other_optimizers() -> None:
    run_ranks(unflushed, 1)


def closed(rank: int) -> None:
    model, opt = build(HostStore(), 3, world=1, zenflow=ZenFlow(topk_ratio=0.25, update_interval=2))
    train(model, opt, rank, range(3))
    opt.close()
    loss_of(model, torch.zeros(2, 6, dtype=torch.long)).backward()
    before = values(model)
    for _ in range(2):
        with pytest.raises(OffloadStateError, match="closed"):
            opt.step()
    assert_equal(values(model), before)
    assert opt.state_dict()["inner"]["state"]


def test_a_step_after_close_changes_nothing() -> None:
    run_ranks(closed, 1)


class Slow(NvmeStore):
    """Moments are written after a while, from the memory that was given, as `put` allows."""

    delay_s = 0.0

    def put(self, name, values, start=0):
        if not self.delay_s or ".exp_avg" not in name:
            return super().put(name, values, start)
        return _Later(self, name, values, start)


class _Later:
    def __init__(self, store: Slow, name: str, values: torch.Tensor, start: int) -> None:
        def write() -> None:
            time.sleep(store.delay_s)
            NvmeStore.put(store, name, values, start).wait()

        self._thread = threading.Thread(target=write)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def is_done(self) -> bool:
        return not self._thread.is_alive()


def two_windows(rank: int, folder: str) -> None:
    """Some units' states are on the device, their parameters in the store: they are stepped beside a late step."""
    mesh, runs = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)), []
    for delay_s in (0.0, 0.004):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(128, 512), nn.Linear(512, 128), nn.Linear(128, 64))
        store = Slow(folder)
        stores = zero.Stores(params=store, optimizer=store, optimizer_ratio=0.95)
        model = zero.shard(net, mesh, stage=3, store=stores, units=[nn.Linear])
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = zen(overlap=True, ratio=0.05, interval=4)
        opt = OffloadedOptimizer(model, inner, window_bytes=1, **options)
        store.delay_s = delay_s
        for step in range(9):
            torch.manual_seed(step)
            model(torch.randn(4, 128)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        opt.flush()
        store.delay_s = 0.0
        runs.append({name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()})
        opt.close()
        store.close()
    assert_equal(runs[1], runs[0])


def test_a_late_step_shares_no_window_with_steps_beside_it(tmp_path) -> None:
    run_ranks(two_windows, 1, str(tmp_path))
