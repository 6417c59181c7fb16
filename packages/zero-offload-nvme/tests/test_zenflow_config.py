"""A `ZenFlow` that cannot be honoured, or part of which would have no effect, is refused with what to do."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
from stored_models import Net, store_of
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zero_offload_nvme import HostStore, OffloadConfigError, OffloadedOptimizer, ZenFlow

WRONG = [
    ({"topk_ratio": 0.0}, "over 0"),
    ({"topk_ratio": 1.5}, "got 1.5"),
    ({"select_strategy": "often"}, "'often'"),
    ({"select_strategy": "step"}, "select_interval"),
    ({"select_strategy": "step", "select_interval": 0}, "at least 1"),
    ({"select_strategy": "epoch"}, "steps_per_epoch"),
    ({"select_interval": 4}, "select_strategy='step'"),
    ({"steps_per_epoch": 10}, "steps_per_epoch"),
    ({"update_interval": 0}, "at least 1"),
    ({"update_interval": True}, "got True"),
    ({"update_interval": 2.5}, "got 2.5"),
    ({"full_warm_up_rounds": -1}, "at least 0"),
    ({"overlap_step": "yes"}, "True or False"),
    ({"auto_ratio": 0.5}, "update_interval='auto'"),
    ({"auto_ratio": 0.0, "update_interval": "auto"}, "over 0"),
    ({"max_update_interval": 8}, "update_interval='auto'"),
    ({"reselect_share": 1.5}, "0 to 1"),
    ({"reselect_share": 0.5, "select_strategy": "step", "select_interval": 4}, "select_strategy='auto'"),
]


@pytest.mark.parametrize(("given", "told"), WRONG)
def test_refused(given, told: str) -> None:
    with pytest.raises(OffloadConfigError, match=told):
        ZenFlow(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"update_interval": "auto", "auto_ratio": 0.5, "max_update_interval": 3},
        {"select_strategy": "step", "select_interval": 16},
        {"select_strategy": "epoch", "steps_per_epoch": 100},
        {"select_strategy": "epoch", "steps_per_epoch": 100, "select_interval": 2},
    ],
)
def test_accepted(given) -> None:
    ZenFlow(**given)


def refusals(rank: int) -> None:
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))

    def model_on(store):
        return zero.shard(Net(1), mesh, stage=2, store=store)

    cases = [
        (model_on(HostStore()), torch.optim.SGD, {"overlap": "zenflow"}, "AdamW or Adam"),
        (model_on(HostStore()), torch.optim.AdamW, {"overlap": "late"}, "'late'"),
        (model_on(HostStore()), torch.optim.AdamW, {"zenflow": ZenFlow()}, "no effect"),
        (model_on(store_of("none", "")), torch.optim.AdamW, {"overlap": "zenflow"}, "in a store"),
    ]
    for model, make, options, told in cases:
        with pytest.raises(OffloadConfigError, match=told):
            OffloadedOptimizer(model, make(model.parameters(), lr=0.1), **options)


def test_the_optimizer_refuses() -> None:
    run_ranks(refusals, 1)
