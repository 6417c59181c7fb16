"""`overlap="speculative"` is the exact step, bit for bit, and really begins during backward."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from stored_models import WIDTH, Net, batch, build, loss_of, stores, train
from torch import nn
from zero_core.testing import run_ranks
from zero_offload_nvme import (
    HostStore,
    NvmeStore,
    OffloadConfigError,
    OffloadedOptimizer,
    OffloadStateError,
    Tiers,
    plan_tiers,
)

LOOSE, TIGHT = 1e9, 1e-3
CLIPPING = {
    "never active": [None, LOOSE, LOOSE, LOOSE, None],
    "sometimes active": [LOOSE, LOOSE, TIGHT, LOOSE, LOOSE],
    "always active": [TIGHT] * 3,
}


def state_of(model, opt):
    """All that a step changes."""
    held = {name: shard.local.clone() for name, shard in zero.sharded_state(model, opt).items()}
    scalars = {
        name: float(value) for name, value in zero.optimizer_scalars(opt).items() if name.endswith("step")
    }
    return zero.full_state_dict(model) | held | {k: torch.tensor(v) for k, v in scalars.items()}


def assert_same(found, expected, what=None) -> None:
    assert found.keys() == expected.keys(), what
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, (what, wrong)


def steps(model, opt, rank: int, limits, accumulate: int) -> list[int]:
    """Train; how many steps of units had begun when each backward was over."""
    begun = []
    for step, limit in enumerate(limits):
        train_step = range(step * accumulate, (step + 1) * accumulate)
        for micro in train_step:
            loss_of(model, batch(micro, rank)).backward()
        begun.append(opt.early_steps.begun if isinstance(opt, OffloadedOptimizer) else 0)
        if limit is not None:
            zero.clip_grad_norm(opt, limit)
        opt.step()
        opt.zero_grad()
    return begun


def parity(rank: int, stage: int, dtype: torch.dtype, accumulate: int, folder: str) -> None:
    for name, limits in CLIPPING.items():
        states = []
        for kind, what in (("none", ""), ("host", "optimizer"), ("nvme", "all")):
            overlap, store = None if kind == "none" else "speculative", stores(kind, what, stage, folder)
            model, opt = build(store, stage, dtype, overlap=overlap, window_bytes=1 << 18)
            begun = steps(model, opt, rank, limits, accumulate)
            states.append(state_of(model, opt))
            if kind == "none":
                continue
            assert_same(states[-1], states[0], (name, kind, what))
            count, num_units = opt.early_steps, begun[1]
            if name == "always active":
                assert count.begun == 0
                continue
            assert num_units == 5, "all units, during the backward after the first step"
            assert count.begun == count.committed + count.discarded == begun[-1]
            # The step after one that clipped waits for its norm.
            num_discarded = num_units if name == "sometimes active" else 0
            assert (count.begun, count.discarded) == ((4 - bool(num_discarded)) * num_units, num_discarded)
            opt.close()


@pytest.mark.parametrize(
    ("stage", "dtype", "accumulate"),
    [
        (1, torch.bfloat16, 1),
        (2, torch.float32, 4),
        (3, torch.float32, 1),
        (3, torch.bfloat16, 4),
        pytest.param(1, torch.bfloat16, 4, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(3, torch.float32, 4, marks=pytest.mark.slow),
        pytest.param(3, torch.bfloat16, 1, marks=pytest.mark.slow),
    ],
)
def test_bit_for_bit(tmp_path, stage: int, dtype: torch.dtype, accumulate: int) -> None:
    run_ranks(parity, 2, stage, dtype, accumulate, str(tmp_path))


def overflows(rank: int, folder: str) -> None:
    """A dynamic scale that overflows now and then, on one rank."""
    for stage in (1, 2, 3):
        states = []
        for kind in ("none", "host", "nvme"):
            scaler = zero.LossScaler(2.0**12, growth_interval=2, at_minimum="skip")
            overlap = None if kind == "none" else "speculative"
            model, opt = build(
                stores(kind, "all", stage, folder), stage, torch.float16, overlap=overlap, scaler=scaler
            )
            skipped = []
            for step in range(8):
                loss = scaler.scale(loss_of(model, batch(step, rank)))
                (loss * float("inf") if step in (3, 5, 6) and rank == 1 else loss).backward()
                if step % 2:
                    zero.clip_grad_norm(opt, LOOSE if step % 3 else TIGHT)
                opt.step()
                skipped.append(opt.last_step_skipped)
                opt.zero_grad()
            assert [step for step, was in enumerate(skipped) if was] == [3, 5, 6]
            states.append(state_of(model, opt) | {"scale": torch.tensor(scaler.value)})
            if kind != "none":
                assert opt.early_steps.discarded
                assert opt.early_steps.committed
            assert_same(states[-1], states[0], (stage, kind))


def test_overflows_leave_no_trace(tmp_path) -> None:
    run_ranks(overflows, 2, str(tmp_path))


class Sometimes(Net):
    """A block that some steps leave out, and a sparse embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(31, WIDTH, sparse=True)
        self.left_out: int | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.rows(ids % 31)
        for number, block in enumerate(self.blocks):
            if number != self.left_out:
                x = block(x)
        return self.head(x)


def odd(rank: int, stage: int, folder: str) -> None:
    """Unused and frozen parameters, sparse rows, a number of micro-batches that changes, rates, `no_sync`."""
    states, counts = [], []
    for kind in ("none", "host", "nvme"):
        overlap = None if kind == "none" else "speculative"
        model, opt = build(stores(kind, "all", stage, folder), stage, overlap=overlap, net=Sometimes)
        for step in range(11):
            model.left_out = {4: 1, 5: 1, 8: rank}.get(step)  # at 8 another one on each rank
            model.blocks[2].up.weight.requires_grad_(step not in (6, 7))
            for micro in range({2: 3, 3: 3}.get(step, 1)):
                loss_of(model, batch(7 * step + micro, rank)).backward()
            if step == 9:
                with zero.no_sync(model):
                    loss_of(model, batch(99, rank)).backward()
            for group in opt.param_groups:
                group["lr"] = 1e-2 / (1 + step // 4)
            opt.step()
            opt.zero_grad(set_to_none=step % 2 == 0)
        states.append(state_of(model, opt))
        assert_same(states[-1], states[0], kind)
        if kind != "none":
            counts.append(opt.early_steps)
    assert counts[0] == counts[1]
    assert counts[0].committed > counts[0].discarded > 0


@pytest.mark.parametrize("stage", [2, 3])
def test_odd_parameters_and_steps(tmp_path, stage: int) -> None:
    run_ranks(odd, 2, stage, str(tmp_path))


def other_optimizers(rank: int, folder: str) -> None:
    makes = {
        "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, initial_accumulator_value=0.1),
        "sgd": lambda params: torch.optim.SGD(params, lr=1e-2),
        "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, nesterov=True),
    }
    for name, make in makes.items():
        states = []
        for kind in ("none", "host", "nvme"):
            overlap = None if kind == "none" else "speculative"
            model, opt = build(
                stores(kind, "all", 3, folder), 3, torch.bfloat16, world=1, make=make, overlap=overlap
            )
            train(model, opt, rank, range(4), clip=None)
            states.append(zero.full_state_dict(model))
            assert_same(states[-1], states[0], (name, kind))
            assert kind == "none" or opt.early_steps.committed == 15


def test_other_optimizers(tmp_path) -> None:
    run_ranks(other_optimizers, 1, str(tmp_path))


def room(rank: int, folder: str) -> None:
    """What waits is bounded: units that find no room are stepped later, to the same values."""
    states, used = [], []
    for nbytes in (0, 200_000, None):
        for store in (HostStore(), NvmeStore(folder)):
            model, opt = build(store, 2, world=1, overlap="speculative", shadow_bytes=nbytes)
            before = store.used_bytes
            train(model, opt, rank, range(4), clip=None)
            states.append(zero.full_state_dict(model))
            assert_same(states[-1], states[0], nbytes)
            used.append(opt.early_steps.committed)
            with_shadows = store.used_bytes
            opt.close()  # moments once, and gradients
            assert store.used_bytes > before
            moments = 2 / 3 * store.used_bytes
            expected = {0: 0, None: moments}.get(nbytes)
            assert expected is None or abs(with_shadows - store.used_bytes - expected) < 0.05 * moments
    assert used[:2] == [0, 0]
    assert used[2] == used[3] in (3, 6, 9, 12)
    assert used[4] == used[5] == 15


def test_room_is_bounded(tmp_path) -> None:
    run_ranks(room, 1, str(tmp_path))


def planned(rank: int, folder: str) -> None:
    """`plan_tiers` counts what waits, to the byte."""
    for stage, what in ((2, "optimizer"), (3, "all"), (3, "params+optimizer")):
        for dtype in (torch.float32, torch.bfloat16):
            model, opt = build(stores("nvme", what, stage, folder), stage, dtype, overlap="speculative")
            store = next(unit.stores.optimizer for unit in opt._sharded.units)
            train(model, opt, rank, range(2), clip=None)
            kinds = dict.fromkeys(
                ["params", "grads", "optimizer"] if what == "all" else what.split("+"), "nvme"
            )
            with torch.device("meta"):
                plan = plan_tiers(
                    Net(), stage=stage, world=2, precision=zero.Precision(compute=dtype),
                    tiers=Tiers(**kinds, speculative=True),
                )  # fmt: skip
            assert plan.total("nvme") == store.used_bytes, (stage, what, dtype)
            assert plan.nbytes["nvme"]["in_flight"]


def test_what_waits_is_planned(tmp_path) -> None:
    run_ranks(planned, 2, str(tmp_path))


def refusals(rank: int) -> None:
    model, opt = build(None, 2, world=1)
    with pytest.raises(OffloadConfigError, match="all of this model's is on the device"):
        OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()), overlap="speculative")
    model, opt = build(HostStore(), 2, world=1)
    for wrong in ({"overlap": "early"}, {"overlap": "zenflow", "shadow_bytes": 1}, {"shadow_bytes": -1}):
        with pytest.raises(OffloadConfigError, match=r"overlap|shadow_bytes"):
            OffloadedOptimizer(model, torch.optim.AdamW(model.parameters()), **wrong)

    class Shelf:
        def __init__(self) -> None:
            self._store = HostStore()

        in_memory = True

        def __getattr__(self, name):
            if name == "swap":
                raise AttributeError(name)
            return getattr(self._store, name)

    with pytest.raises(OffloadConfigError, match=r"Shelf: expected a store with swap"):
        build(zero.Stores(optimizer=Shelf()), 2, world=1, overlap="speculative")

    model, opt = build(HostStore(), 2, world=1, overlap="speculative")
    with opt:
        train(model, opt, rank, range(3), clip=None)
    with pytest.raises(OffloadStateError, match="closed"):
        train(model, opt, rank, range(1), clip=None)


def test_refusals() -> None:
    run_ranks(refusals, 1)
