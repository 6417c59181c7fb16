"""ZenFlow by DeepSpeed's keys: the losses of a loop by hand, checkpoints for anyone, errors before anything moves."""

from __future__ import annotations

import pytest
import torch
import zero_core as zero
import zero_offload_nvme as off
import zerostack
from torch.distributed.device_mesh import init_device_mesh
from zero_core.testing import run_ranks
from zerostack import ConfigError
from zerostack_models import Small, batch, config, train

KEYS = {
    "topk_ratio": 0.2, "select_strategy": "step", "select_interval": 4, "update_interval": 2,
    "full_warm_up_rounds": 1, "overlap_step": True, "pt_reserved_cores_perc": 0.5, "late_step": "one",
}  # fmt: skip
POLICY = off.ZenFlow(**{name: value for name, value in KEYS.items() if not name.startswith("pt_")})


def made(stage, zenflow, where=None, **more):
    where = {"device": "cpu"} if where is None else where
    raw = config(stage, **more)
    raw["zero_optimization"] = {"stage": stage, "offload_optimizer": where, "zenflow": zenflow}
    torch.manual_seed(0)
    return zerostack.initialize(model=Small(), config=raw)[0]


def by_hand(rank, stage, steps):
    """The same in a loop over zero-core, with what the configuration's optimizer and clipping are."""
    torch.manual_seed(0)
    model = Small()
    raw = config(stage)
    made_by = zerostack.policies.optimizer(
        zerostack.resolve.effective(raw, zerostack.auto.Surroundings(world=2)).config, model.parameters()
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = zero.shard(model, mesh, stage=stage, store=zero.Stores(optimizer=off.HostStore()))
    losses = []
    with off.OffloadedOptimizer(model, made_by, overlap="zenflow", zenflow=POLICY) as optimizer:
        for step in steps:
            loss = model(batch(step, rank))
            loss.backward()
            zero.clip_grad_norm(optimizer, raw["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def same(rank, stage):
    engine = made(stage, KEYS)
    losses = train(engine, rank, range(9))
    engine.close()
    assert losses == by_hand(rank, stage, range(9))
    exact = made(stage, None)
    assert train(exact, rank, range(9)) != losses
    exact.close()  # ends nothing


@pytest.mark.parametrize("stage", [2, 3])
def test_the_losses_of_a_loop_by_hand(stage):
    run_ranks(same, 2, stage)


def resumed(rank, root):
    engine = made(2, KEYS)
    train(engine, rank, range(4))  # a window's update is under way
    engine.save_checkpoint(root)
    expected = train(engine, rank, range(4, 9))
    engine.load_checkpoint(root)  # over what waits now
    assert train(engine, rank, range(4, 9)) == expected
    other = made(2, KEYS)
    train(other, rank, range(3))
    other.load_checkpoint(root)
    assert train(other, rank, range(4, 9)) == expected
    path = other.save_16bit_model(root)
    assert path.exists()
    exact = made(3, None)  # another stage and another kind of step
    exact.load_checkpoint(root)
    assert train(exact, rank, range(4, 5)) == pytest.approx(expected[:1], rel=1e-5)
    for each in (engine, other):
        each.close()


def alone(rank, root):
    engine = made(1, KEYS)
    engine.load_checkpoint(root)
    assert train(engine, rank, range(4, 9))
    engine.flush()
    engine.close()


def test_checkpoints(tmp_path):
    run_ranks(resumed, 2, tmp_path)
    run_ranks(alone, 1, tmp_path)


def refusals(rank):
    for keys, more, message in (
        (KEYS | {"topk_ratio": 0.0}, {}, "zenflow.topk_ratio"),
        (KEYS | {"select_strategy": "epoch", "select_interval": 1}, {}, "steps_per_epoch.*train_batch_size"),
        (KEYS | {"select_interval": "auto"}, {}, "zenflow.*select_interval"),
        (KEYS | {"offload": True}, {}, "zenflow.offload"),
        (KEYS, {"where": {"device": "none"}}, "zenflow.*on the device"),
        (KEYS, {"where": {"device": "cpu", "ratio": 0.0}}, "zenflow.*on the device"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(2, keys, **more)
    raw = config(2)
    del raw["optimizer"]
    raw["zero_optimization"] = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": {}}
    model = Small()
    with pytest.raises(ConfigError, match="zenflow: expected Adam or AdamW"):
        zerostack.initialize(model=model, optimizer=lambda params: torch.optim.SGD(params, 0.1), config=raw)
    zerostack.initialize(model=model, config=config(1))  # nothing has happened to it
    epoch = KEYS | {"select_strategy": "epoch", "select_interval": 1, "steps_per_epoch": 4}
    engine = made(2, epoch)
    by_step = made(2, KEYS)
    assert train(engine, rank, range(9)) == train(by_step, rank, range(9))
    assert train(made(2, {}), rank, range(3))  # DeepSpeed's defaults


def test_what_cannot_be_is_refused_before_anything_moves():
    run_ranks(refusals, 1)
