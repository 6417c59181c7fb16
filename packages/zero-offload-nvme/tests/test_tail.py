"""What stays on the device is what backward reduces last, and as little as hides the host."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from hypothesis import given
from hypothesis import strategies as st
from stored_models import AllUsed, Net, batch, build, loss_of, stores, train
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, OffloadConfigError, hidden_ratio


def over_s(sizes: list[int], num: int, backward_s: float, speed: float) -> float:
    """When the host is through with the `num` units that are reduced first; simulated."""
    total, at, done = sum(sizes), 0.0, 0.0
    for size in sizes[::-1][:num]:
        at += backward_s * size / total
        done = max(done, at) + size / speed
    return done


SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@given(SIZES, st.floats(0.01, 10), st.floats(1, 1e6), st.floats(0, 5))
def test_the_most_that_is_hidden(sizes, backward_s, speed, slack_s) -> None:
    ratio = hidden_ratio(sizes, backward_s=backward_s, elements_per_s=speed, slack_s=slack_s)
    stored = [
        each.optimizer is not None
        for each in zero.Stores(optimizer=HostStore(), optimizer_ratio=ratio, keep_first=True).of_units(sizes)
    ]
    num, limit = sum(stored), backward_s + slack_s
    assert stored == [False] * (len(sizes) - num) + [True] * num, "those defined first stay on the device"
    assert over_s(sizes, num, backward_s, speed) <= limit * (1 + 1e-9)
    assert num == len(sizes) or over_s(sizes, num + 1, backward_s, speed) >= limit * (1 - 1e-9)


def test_ends() -> None:
    assert hidden_ratio([4, 4], backward_s=1.0, elements_per_s=1e9, slack_s=1.0) == 1.0
    assert hidden_ratio([4, 4], backward_s=1.0, elements_per_s=9.0) == 0.5
    assert hidden_ratio([4, 4], backward_s=1.0, elements_per_s=1e-3) == 0.0
    assert hidden_ratio([], backward_s=1.0, elements_per_s=1.0) == 1.0
    assert hidden_ratio(Net(), backward_s=1.0, elements_per_s=1e9, slack_s=1.0) == 1.0
    for wrong in ({"backward_s": -1.0, "elements_per_s": 1.0}, {"backward_s": 1.0, "elements_per_s": 0.0}):
        with pytest.raises(OffloadConfigError, match="hidden_ratio"):
            hidden_ratio([1], **wrong)


def reduced_last(rank: int, folder: str) -> None:
    """Seen in a backward pass: every unit on the device is reduced after every unit in the store."""
    states = []
    for kind in ("none", "host", "nvme"):
        ratio = hidden_ratio(AllUsed(), backward_s=1.0, elements_per_s=1e5)
        assert 0 < ratio < 1
        store = stores(kind, "optimizer", 2, folder)
        placed = (
            None
            if store is None
            else zero.Stores(optimizer=store.optimizer, optimizer_ratio=ratio, keep_first=True)
        )
        model, opt = build(placed, 2, overlap="speculative", net=AllUsed)
        train(model, opt, rank, range(3), clip=None)
        order = []

        class Watcher:
            def saw(self, lane) -> None:
                order.append(lane.unit.stores.optimizer is not None)  # noqa: B023 - one loop, one list

        watcher = Watcher()
        opt._sharded.reducer.watch(watcher.saw)
        loss_of(model, batch(3, rank)).backward()
        opt.step()
        opt.zero_grad()
        states.append(zero.full_state_dict(model))
        assert all(torch.equal(states[-1][name], states[0][name]) for name in states[0])
        if placed is not None:
            assert order == sorted(order, reverse=True)
            assert 0 < sum(order) < len(order)
            assert opt.early_steps.committed == 3 * sum(order)


def test_those_reduced_last_stay(tmp_path) -> None:
    run_ranks(reduced_last, 2, str(tmp_path))
