"""Shards that rest in a store: the same bits at every stage, and nothing fetched that was not put there before."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from zero_core.api import sharded
from zero_core.steppers import FusedStepper
from zero_core.testing import run_ranks
from zero_core_models import Net, batches, dp_mesh, loss_of, relative_error, seeded


class Done:
    def wait(self) -> None: ...

    def is_done(self) -> bool:
        return True


class Shelf:
    """The simplest store; values come back on the wait only, and what is prefetched may grow stale."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self.near: dict[str, torch.Tensor] = {}
        self.counts = {"put": 0, "fetch": 0, "hit": 0}

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> Done:
        self.counts["put"] += 1
        self.near.pop(name, None)
        if name not in self.kept:
            self.kept[name] = torch.empty_like(values)
        self.kept[name][start : start + values.numel()] = values
        return Done()

    def fetch(self, name: str, out: torch.Tensor, start: int = 0):
        self.counts["fetch"] += 1
        source = self.near.pop(name, None)
        self.counts["hit"] += source is not None
        values = self.kept[name] if source is None else source
        out.fill_(float("nan"))

        class Later(Done):
            def wait(self) -> None:
                out.copy_(values[start : start + out.numel()])

        return Later()

    def prefetch(self, name: str) -> None:
        self.near[name] = self.kept[name].clone()

    def forget(self, name: str) -> None:
        self.near.pop(name, None)

    def view(self, name: str) -> torch.Tensor:
        return self.kept[name]

    def release(self, name: str) -> None:
        del self.kept[name]


def train(rank: int, stage: int, what: str, dtype: torch.dtype, accumulate: int):
    shelf = Shelf()
    store = {"none": None, "all": shelf}.get(what)
    if what in ("params", "grads", "optimizer"):
        store = zero.Stores(**{what: shelf})
    model = zero.shard(
        seeded(Net), dp_mesh(2), stage=stage, precision=zero.Precision(compute=dtype), store=store
    )
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = zero.ShardedOptimizer(model, inner, stepper=FusedStepper(inner))
    for step, ids in enumerate(batches(rank, 4 * accumulate)):
        loss_of(model, ids).backward()
        if step % accumulate == accumulate - 1:
            loss_of(model, ids).backward()  # a second one before the step
            zero.clip_grad_norm(opt, 0.5)
            opt.step()
            opt.zero_grad()
            with torch.no_grad():
                loss_of(model, ids)
    zero.set_full(model, "norm.bias", torch.linspace(0, 1, 19))
    loss_of(model, ids).backward()
    opt.step()
    masters = {n: s.local.clone() for n, s in zero.sharded_state(model, opt).items() if "master" in n}
    return zero.full_state_dict(model), masters, shelf.counts, set(shelf.kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("stage", "whats"),
    [(1, ["optimizer", "all"]), (2, ["grads", "all"]), (3, ["params", "grads", "optimizer", "all"])],
)
def test_the_same_bits(stage: int, whats: list[str], accumulate: int, dtype: torch.dtype) -> None:
    plain, masters, counts, _ = run_ranks(train, 2, stage, "none", dtype, accumulate)[0]
    assert counts["put"] == 0
    for what in whats:
        found, own, counts, kept = run_ranks(train, 2, stage, what, dtype, accumulate)[0]
        assert relative_error(found, plain) == 0.0, what
        assert relative_error(own, masters) == 0.0, what
        assert bool(kept) == (dtype != torch.float32 or ((stage, what) != (1, "all") and what != "optimizer"))
        if what == "params":
            assert counts["hit"] > 0, "nothing was ever prefetched"


def refused(rank: int) -> None:
    for stage, kind in ((0, "optimizer"), (1, "grads"), (2, "params")):
        with pytest.raises(zero.ZeroConfigError, match=f"{kind}=.*at stage {stage}"):
            zero.shard(seeded(Net), dp_mesh(1), stage=stage, store=zero.Stores(**{kind: Shelf()}))
    with pytest.raises(zero.ZeroConfigError, match="optimizer_ratio"):
        zero.Stores(optimizer_ratio=1.5)
    model = zero.shard(seeded(Net), dp_mesh(1), stage=1, store=Shelf())
    inner = torch.optim.AdamW(model.parameters())
    with pytest.raises(zero.ZeroConfigError, match="OffloadedOptimizer"):
        zero.ShardedOptimizer(model, inner)
    assert [id(p) for p in inner.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_what_has_no_effect_is_refused() -> None:
    run_ranks(refused, 1)


def ratios(rank: int) -> list[int]:
    found = []
    for ratio in (0.0, 0.3, 0.6, 1.0):
        shelf = Shelf()
        stores = zero.Stores(optimizer=shelf, optimizer_ratio=ratio)
        precision = zero.Precision(compute=torch.bfloat16)
        model = zero.shard(seeded(Net), dp_mesh(1), stage=1, store=stores, precision=precision)
        inner = torch.optim.AdamW(model.parameters())
        zero.ShardedOptimizer(model, inner, stepper=FusedStepper(inner))
        found.append(sum(tensor.numel() for tensor in shelf.kept.values()))
    return [100 * each // found[-1] for each in found]


def test_which_units_keep_their_state_on_the_device() -> None:
    sizes = [5, 1, 4, 0, 10]
    for ratio, first, last in (
        (0.0, "", ""),
        (0.5, "0123", "4"),
        (0.75, "0123", "1234"),
        (1.0, "01234", "01234"),
    ):
        for keep_first, expected in ((False, first), (True, last)):
            found = zero.Stores(optimizer=Shelf(), optimizer_ratio=ratio, keep_first=keep_first).of_units(
                sizes
            )
            stored = "".join(str(number) for number, each in enumerate(found) if each.optimizer)
            assert stored.replace("3", "") == expected.replace("3", ""), (ratio, keep_first)


def watched(rank: int) -> None:
    """Every unit once a backward, when its gradient shard is final; a watcher that is gone is not called."""
    model = zero.shard(seeded(Net), dp_mesh(1), stage=2)
    reducer, seen = sharded(model).reducer, []

    class Watcher:
        def saw(self, lane) -> None:
            assert lane.shard.value is not None
            seen.append((lane.unit.index, lane.shard.num_reduced))

    watcher = Watcher()
    reducer.watch(watcher.saw)
    for number in (1, 2):
        loss_of(model, next(iter(batches(rank, 1)))).backward()
        assert sorted(seen) == [
            (lane.unit.index, number) for lane in sorted(reducer.lanes, key=lambda e: e.unit.index)
        ]
        seen.clear()
    versions = [lane.shard.version for lane in reducer.lanes]
    model.zero_grad()
    assert all(lane.shard.num_reduced == 0 for lane in reducer.lanes)
    assert all(lane.shard.version > old for lane, old in zip(reducer.lanes, versions, strict=True))
    del watcher
    loss_of(model, next(iter(batches(rank, 1)))).backward()
    assert not seen


def test_a_watcher_sees_reduced_gradients() -> None:
    run_ranks(watched, 1)


def test_a_ratio_of_the_optimizer_state() -> None:
    shares = run_ranks(ratios, 1)[0]
    assert shares[0] == 0
    assert 0 < shares[1] <= 30
    assert shares[1] < shares[2] <= 60


class Coarse(Shelf):
    """Keeps less than it is given; who looks gets a copy."""

    is_lossy = True

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> Done:
        return super().put(name, values.mul(16).round().div(16), start)

    def view(self, name: str) -> torch.Tensor:
        return self.kept[name].clone()


def coarse_frozen(rank: int, world: int) -> None:
    """Frozen parameters start from what is kept of them, and whoever reads or writes them meets the store."""
    shelf, start = Coarse(), seeded(Net)
    start.blocks[1].requires_grad_(False)
    expected = {name: value.clone() for name, value in start.state_dict().items()}
    for name in expected:
        if name.startswith("blocks.1."):
            expected[name] = expected[name].mul(16).round().div(16)
    with pytest.raises(zero.ZeroConfigError, match="Coarse keeps approximations"):
        zero.shard(seeded(Net), dp_mesh(world), stage=3, store=zero.Stores(params=shelf))
    with pytest.raises(zero.ZeroConfigError, match="at stage 2 every rank holds all of them"):
        zero.shard(seeded(Net), dp_mesh(world), stage=2, store=zero.Stores(frozen=shelf))
    model = zero.shard(start, dp_mesh(world), stage=3, store=zero.Stores(frozen=shelf))
    opt = zero.ShardedOptimizer(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    found = zero.full_state_dict(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(shelf.kept) == 1
    for ids in batches(rank, 2):
        loss_of(model, ids).backward()
        opt.step()
        opt.zero_grad()
    found = zero.full_state_dict(model)
    for name, value in expected.items():
        assert torch.equal(found[name], value) == (
            name.startswith("blocks.1.") or name == "bias" or not value.numel()
        )
    zero.set_full(model, "blocks.1.up.bias", torch.full_like(expected["blocks.1.up.bias"], 0.52))
    assert torch.equal(
        zero.get_full(model, "blocks.1.up.bias"), torch.full_like(expected["blocks.1.up.bias"], 0.5)
    )
    assert torch.equal(zero.get_full(model, "blocks.1.up.weight"), expected["blocks.1.up.weight"])
    kept = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    with zero.materialized(model, write=True), torch.no_grad():
        model.blocks[1].down.weight.fill_(3.0)
    assert float(zero.get_full(model, "blocks.1.down.weight").mean()) == 3.0
    zero.load_sharded_state(model, opt, kept)
    assert torch.equal(zero.get_full(model, "blocks.1.down.weight"), expected["blocks.1.down.weight"])
    zero.load_full_state_dict(model, expected)
    assert torch.equal(zero.get_full(model, "blocks.1.up.bias"), expected["blocks.1.up.bias"])


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_parameters_in_a_lossy_store(world: int) -> None:
    run_ranks(coarse_frozen, world, world)
