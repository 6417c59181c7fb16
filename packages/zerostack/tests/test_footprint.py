"""Bytes per rank that `explain` prints are those of the configuration: shards, tiers, copies and the real optimizer."""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import zero_core as zero
import zerostack
from zerostack.auto import Surroundings
from zerostack.explain import explain
from zerostack.footprint import footprint
from zerostack.resolve import effective
from zerostack_models import Small, config

N = 1_000_000


def found(section, world=8, passed=None, **more):
    raw = config(0) | {"zero_optimization": section, "bf16": {"enabled": True}} | more
    return footprint(effective(raw, Surroundings(world=world)), N, passed)


def test_shards_are_those_of_mics():
    two, eight = found({"stage": 3, "mics_shard_size": 2}), found({"stage": 3})
    assert two.nbytes["optimizer"]["device"] == 8 * N // 2
    assert eight.nbytes["optimizer"]["device"] == 8 * N // 8
    assert two.nbytes == found({"stage": 3}, world=2).nbytes


def test_what_is_offloaded_is_not_on_the_device():
    section = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
        "offload_param": {"device": "cpu"},
    }
    plan = found(section)
    device = {kind: of["device"] for kind, of in plan.nbytes.items()}
    assert not any(device.values())
    assert plan.nbytes["optimizer"]["nvme"] >= 8 * N // 8
    assert plan.nbytes["params"]["host"] == 2 * N // 8
    half = found({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}})
    assert half.nbytes["optimizer"]["device"] == half.nbytes["optimizer"]["host"] == 8 * N // 8 // 2
    late = found({"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {}})
    assert late.nbytes["in_flight"]["host"] >= 4 * N // 8


def test_copies_of_compressed_collectives_count():
    assert found({"stage": 3, "zero_hpz_partition_size": 4}).nbytes["secondary (hpZ)"]["device"] == 2 * N // 4
    both = {"stage": 3, "zero_hpz_partition_size": 4, "zero_quantized_weights": True}
    assert found(both).nbytes["secondary (hpZ)"]["device"] == N // 4
    loco = {"stage": 3, "zero_quantized_gradients": True, "zeropp_loco_param": {}}
    assert found(loco).nbytes["residuals (LoCo)"]["device"] == 4 * N


@pytest.mark.parametrize(
    ("make", "nbytes", "assumed"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 12, None),
        (lambda p: torch.optim.Adam(p), 8, None),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, None),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, None),
        (lambda p: torch.optim.Adafactor(p), 8, "that of Adafactor is not known"),
    ],
)
def test_the_state_is_that_of_the_optimizer_that_was_passed(make, nbytes, assumed):
    plan = found({"stage": 1}, passed=make([torch.nn.Parameter(torch.zeros(1))]))
    assert plan.nbytes["optimizer"]["device"] == nbytes * N // 8
    assert (plan.assumed or "").endswith(assumed or "")


def test_the_state_is_that_of_the_optimizer_that_is_named():
    amsgrad = {"type": "AdamW", "params": {"amsgrad": True}}
    assert found({"stage": 1}, optimizer=amsgrad).nbytes["optimizer"]["device"] == 12 * N // 8
    named = {"type": "OneBitAdam", "params": {}}
    one_bit = cc.OneBitAdam([torch.nn.Parameter(torch.zeros(1))], shard=True)
    assert found({"stage": 1}, optimizer=named).nbytes == found({"stage": 1}, passed=one_bit).nbytes


def test_where_nothing_says_which_optimizer_it_is_explain_says_so():
    settings = effective({"train_batch_size": 8}, Surroundings(world=8))
    assert "Adam's is assumed" in explain(settings, N)


@pytest.mark.usefixtures("solo")
def test_of_a_model_it_is_what_is_planned_for_it():
    engine = zerostack.initialize(model=Small(), config=config(2))[0]
    plan = footprint(engine.parts.settings, engine.module, engine.optimizer.inner)
    expected = zero.plan_memory(engine.module, stage=2, world=1)
    assert plan.total("device") == expected.total
    assert plan.assumed is None
