"""`policy="auto"`: measured in the first calls, decided by all ranks alike, said aloud; off where it does not pay."""

from __future__ import annotations

import logging
import time

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress import ops, trials
from comm_compress.hops import Done
from comm_compress.traffic import Entry
from compress_lab import batch, build, loss_of, shard, train
from zero_core.testing import run_ranks

DELAY_S = 0.02


def slow(call):
    def slower(*args, **kwargs):
        time.sleep(DELAY_S)
        return call(*args, **kwargs)

    return slower


def decide(rank: int, world: int, what: str) -> tuple[list[bool], str]:
    """Train with something slow on the last rank alone; which kinds end up compressed, and the table."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if rank == world - 1 and what == "codec":
            for name in ("encode", "decode", "decode_sum"):
                monkeypatch.setattr(ops, name, slow(getattr(ops, name)))
        if rank == world - 1 and what == "wire":
            for name in ("all_gather", "reduce_scatter"):
                monkeypatch.setattr(zero.PlainCollectives, name, slow(getattr(zero.PlainCollectives, name)))
        made = cc.QuantizedCollectives(node_size=1, min_bytes=0, policy="auto")
        model, opt = shard(build(), 2, made)
        train(model, opt, rank, range(trials.NUM_PASSES + 3))
        before = cc.traffic(made)
        train(model, opt, rank, range(100, 101))
        after = cc.traffic(made)
    compressed = []
    for kind in ("gather", "reduce"):
        sent = after.line(kind).sent.total - before.line(kind).sent.total
        compressed.append(sent < 0.5 * (after.line(kind).plain.total - before.line(kind).plain.total))
    return compressed, str(after)


@pytest.mark.parametrize(("what", "pays"), [("codec", False), ("wire", True)])
def test_all_ranks_decide_alike_by_the_slowest(what: str, pays: bool) -> None:
    for compressed, table in run_ranks(decide, 2, 2, what):
        assert compressed == [pays, pays]
        assert ("travel compressed" in table) == pays
        assert ("does not pay" in table) == (not pays)


def values(rank: int, world: int) -> tuple[list[bool], int]:
    """While it is measured, forward and backward see the same weights, all ranks alike; and it is logged once."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("comm_compress").addHandler(handler)
    logging.getLogger("comm_compress").setLevel(logging.INFO)
    made = cc.QuantizedCollectives(node_size=2, secondary=True, min_bytes=0, policy="auto")
    model, opt = shard(build(), 3, made)
    seen = []
    for step in range(trials.NUM_PASSES + 3):
        with torch.no_grad():
            first = float(loss_of(model, batch(0, step)))
        with zero.no_sync(model):
            loss = loss_of(model, batch(0, step))
            loss.backward()
        opt.zero_grad()
        told = [torch.zeros(2) for _ in range(world)]
        dist.all_gather(told, torch.tensor([first, float(loss)]))
        seen.append(all(torch.equal(each, told[0]) and each[0] == each[1] for each in told))
        train(model, opt, rank, range(step, step + 1))
    return seen, sum("travel" in record.getMessage() for record in records)


def test_forward_and_backward_see_the_same_weights_meanwhile() -> None:
    for rank, (seen, num_told) in enumerate(run_ranks(values, 4, 4)):
        assert all(seen)
        assert (num_told > 0) == (rank == 0)


def test_weights_of_one_version_for_good_are_not_measured() -> None:
    """As those that nobody trains: one way for all calls, and nothing is kept of them."""
    spending = trials.Spending()
    trial = trials.Trial("gather", Entry("gather"), None, torch.device("cpu"), spending)
    ways = []
    for _ in range(50):
        trial.run(1 << 20, 7, 3, lambda compressed: ways.append(compressed) or Done())
    assert ways == [True] * 50
    assert not spending.is_measured
    assert trial.passes == [[]]


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_of_the_passes_of_either_way_half_have_the_other_kind_compressed(shift: int) -> None:
    made = {
        kind: trials.Trial(kind, Entry(kind), None, torch.device("cpu"), trials.Spending())
        for kind in trials._TURN
    }
    numbers = range(1, 1 + trials.NUM_PASSES)
    for one, other in (("gather", "reduce"), ("reduce", "gather")):
        for way in (False, True):
            beside = [
                made[other]._goes_compressed(number + shift)
                for number in numbers
                if made[one]._goes_compressed(number) == way
            ]
            assert len(beside) == trials.NUM_PASSES // 2
            assert sum(beside) == len(beside) // 2
