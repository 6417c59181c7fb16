"""What cannot be honoured is refused before anything travels; ranks that differ, die or part end with an error."""

from __future__ import annotations

import os
import time

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from compress_lab import batch, build, loss_of, shard, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from zero_core.testing import run_ranks

TIMEOUT_S = 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int2"}, "weights: expected 'int8', 'int4' or None, got 'int2'"),
        ({"grads": 8}, "grads: expected 'int8', 'int4' or None, got 8"),
        ({"frozen": "fp8"}, "frozen: expected"),
        ({"secondary": True}, "give node_size= or mesh="),
        ({"block_size": 0}, "block_size: expected a number of at least 1, got 0"),
        ({"block_size": 31}, "block_size: expected an even number of at least 1, got 31"),
        ({"min_bytes": -1}, "min_bytes: expected a number of bytes >= 0, got -1"),
        ({"policy": "never"}, "policy: expected 'always' or 'auto', got 'never'"),
        ({"timeout_s": 0}, "timeout_s: expected seconds above 0, got 0"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(cc.CompressConfigError) as raised:
        cc.QuantizedCollectives(**options)
    assert message in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_no_group_yet() -> None:
    with pytest.raises(cc.CompressStateError, match="no group yet"):
        cc.QuantizedCollectives().all_gather(torch.zeros(1), torch.zeros(1), tag=1)


def test_traffic_of_something_else() -> None:
    with pytest.raises(cc.CompressConfigError, match="traffic: expected QuantizedCollectives"):
        cc.traffic(object())  # type: ignore[arg-type]  # refused


def refuse(rank: int, world: int) -> list[str]:
    found = []
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("node", "local"))
    wrong = [
        {"node_size": 3},
        {"node_size": 0},
        {"node_size": 2.0},
        {"node_size": 2, "mesh": mesh},
        {"mesh": mesh["local"]},
    ]
    for options in wrong:
        with pytest.raises(cc.CompressConfigError) as raised:
            zero.shard(build(), dist.group.WORLD, stage=3, collectives=cc.QuantizedCollectives(**options))
        found.append(str(raised.value))
    made = cc.QuantizedCollectives(weights="int8" if rank != 2 else "int4", node_size=2)
    with pytest.raises(cc.CompressConfigError) as raised:
        zero.shard(build(), dist.group.WORLD, stage=3, collectives=made)
    found.append(str(raised.value))
    made = cc.QuantizedCollectives(shared_memory=rank != 2, node_size=2)
    with pytest.raises(cc.CompressConfigError) as raised:
        zero.shard(build(), dist.group.WORLD, stage=3, collectives=made)
    found.append(str(raised.value))
    return found


def test_wrong_nodes_and_ranks_that_differ() -> None:
    for found in run_ranks(refuse, 4, 4):
        assert len(found) == 7
        for message, given in zip(found[:3], ("3", "0", "2.0"), strict=True):
            assert message == f"node_size: expected a divisor of the group's 4 ranks (1, 2, 4), got {given}"
        assert "leave one out" in found[3]
        assert "over the ranks [0, 1, 2, 3] of the group" in found[4]
        assert "rank 2 of 4 has weights='int4' (rank 0: 'int8')" in found[5]
        assert "rank 2 of 4 has shared_memory=False (rank 0: True)" in found[6]


def fail(rank: int, world: int, stage: int, how: str) -> tuple[str, float]:
    made = cc.QuantizedCollectives(
        node_size=1, secondary=stage == 3, min_bytes=0, timeout_s=TIMEOUT_S, shared_memory=how != "dies alone"
    )
    model, opt = shard(build(), stage, made, overlap=zero.Overlap(timeout_s=TIMEOUT_S))
    train(model, opt, rank, range(2))
    start = time.monotonic()
    if rank == 1:
        if how.startswith("dies"):
            model.blocks[1].register_full_backward_hook(lambda *_: os._exit(17))
        elif how == "stalls":
            time.sleep(TIMEOUT_S * 3)
            return "", 0.0
    try:
        if how != "has a backward less" or rank == 0:
            loss_of(model, batch(rank, 9)).backward()
        opt.step()
    except zero.CollectiveError as error:
        return str(error), time.monotonic() - start
    return "", time.monotonic() - start


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (2, "dies"),
        (3, "dies"),
        (3, "stalls"),
        (3, "has a backward less"),
        *(pytest.param(2, how, marks=SLOW) for how in ("dies alone", "stalls", "has a backward less")),
        pytest.param(3, "dies alone", marks=SLOW),
    ],
)
def test_survivors_end_with_a_name(stage: int, how: str) -> None:
    dies = how.startswith("dies")
    message, seconds = run_ranks(fail, 2, 2, stage, how, tolerate=(0, 1) if dies else (), timeout_s=90)[0]
    assert "rank 0 of 2" in message
    assert "rank 1" in message or "ranks have parted" in message
    assert seconds < TIMEOUT_S * 4 + 5


def whole_gradients_are_missing(rank: int) -> None:
    model = fully_shard(torch.nn.Linear(8, 8), mesh=init_device_mesh("cpu", (1,)))
    model(torch.ones(2, 8)).sum().backward()
    for make in (cc.OneBitAdam, cc.ZeroOneAdam, cc.OneBitLamb):
        with pytest.raises(
            cc.CompressConfigError, match=r"'param\.0': expected a plain tensor, got a DTensor"
        ):
            make(model.parameters(), lr=1e-3).step()


def test_1bit_optimizers_refuse_fsdps_parameters() -> None:
    run_ranks(whole_gradients_are_missing, 1)
