"""A checkpoint meets another configuration than the one it was saved under: what it brings, what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import zero_core as zero
import zerostack
from zero_core.testing import run_ranks
from zerostack_models import Small, batch, config

pytestmark = pytest.mark.usefixtures("solo")


def build(stage=1, **more):
    return zerostack.initialize(model=Small(), config=config(stage, **more))[0]


def train(engine, steps):
    for _ in range(steps * engine.gradient_accumulation_steps()):
        engine.backward(engine(batch(engine.micro_steps, 0)))
        engine.step()


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulation_starts_at_a_boundary_after_a_resume(tmp_path, accumulation):
    engine = build(gradient_accumulation_steps=1)
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    again = build(gradient_accumulation_steps=accumulation)
    again.load_checkpoint(tmp_path)
    assert (again.global_steps, again.micro_steps) == (4, 4 * accumulation)
    for micro in range(accumulation):
        assert again.is_gradient_accumulation_boundary() == (micro == accumulation - 1)
        again.backward(again(batch(micro, 0)))
        again.step()
    assert again.global_steps == 5


def test_what_accumulated_half_way_is_not_saved_and_said(tmp_path, caplog):
    engine = build(gradient_accumulation_steps=3)
    train(engine, 1)
    engine.backward(engine(batch(9, 0)))
    engine.step()
    engine.save_checkpoint(tmp_path)
    assert "gradients of 1 micro-batch(es) since the last update are not saved" in caplog.text


FP16 = {"enabled": True, "initial_scale_power": 8}


@pytest.mark.parametrize(
    ("saved", "loaded", "scale"),
    [
        ({"fp16": FP16}, {"fp16": {"enabled": True}}, 32.0),
        ({"bf16": {"enabled": True}}, {"fp16": FP16}, 256.0),
        ({"fp16": FP16}, {"bf16": {"enabled": True}}, 1.0),
        ({"fp16": FP16}, {"fp16": {"enabled": True, "loss_scale": 128}}, 128.0),
        ({"fp16": FP16}, {"torch_autocast": {"enabled": True, "dtype": "float16"}}, 32.0),
    ],
)
def test_a_learned_loss_scale_goes_only_where_scales_are_learned(tmp_path, saved, loaded, scale):
    engine = build(**saved)
    train(engine, 1)
    if engine.fp16_enabled():
        engine.parts.scaler.value = 32.0
    engine.save_checkpoint(tmp_path)
    again = build(**loaded)
    again.load_checkpoint(tmp_path)
    assert again.loss_scale == scale


def test_a_schedule_keeps_its_own_shape(tmp_path):
    def cosine(total):
        params = {"total_num_steps": total, "warmup_num_steps": 2, "cos_min_ratio": 0.0}
        return {"type": "WarmupCosineLR", "params": params}

    engine = build(scheduler=cosine(10))
    train(engine, 10)
    assert engine.get_lr()[0] < 0.001
    engine.save_checkpoint(tmp_path)
    longer, straight = build(scheduler=cosine(40)), build(scheduler=cosine(40))
    longer.load_checkpoint(tmp_path)
    train(straight, 10)
    assert longer.get_lr() == straight.get_lr()
    assert longer.get_lr()[0] > 0.005
    train(longer, 2)
    train(straight, 2)
    assert longer.get_lr() == straight.get_lr()

    other = build(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 2}})
    before = zero.full_state_dict(other.module)
    with pytest.raises(
        zerostack.CheckpointError, match="state of a WarmupCosineLR, the engine has a WarmupLR"
    ):
        other.load_checkpoint(tmp_path)
    after = zero.full_state_dict(other.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    other.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
    assert other.global_steps == 10


def masters(engine):
    described = zero.sharded_state(engine.module, engine.optimizer)
    return {name: shard.local.clone() for name, shard in described.items() if name.endswith(".master")}


def without_states(rank, root, low, more):
    engine = build(2, **low)
    train(engine, 2)
    engine.save_checkpoint(root)
    expected = masters(engine)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    for what in ({"load_optimizer_states": False}, {"load_module_only": True}):
        again = build(**low, **more)
        again.load_checkpoint(root, **what)
        found = masters(again)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), what
        assert not any("exp_avg" in name for name in zero.sharded_state(again.module, again.optimizer))
        values, saved = zero.full_state_dict(again.module), zero.full_state_dict(engine.module)
        assert all(torch.equal(values[name], saved[name]) for name in saved)
        train(again, 1)


@pytest.mark.parametrize(
    ("low", "section"),
    [
        ({"bf16": {"enabled": True}}, {"stage": 1}),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, {"stage": 3}),
        ({"bf16": {"enabled": True}}, {"stage": 3, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_masters_are_the_models_whatever_becomes_of_the_optimizer(tmp_path, low, section):
    run_ranks(without_states, 2, tmp_path, low, {"zero_optimization": section})


def test_another_optimizer_is_refused(tmp_path):
    engine = build()
    train(engine, 1)
    engine.save_checkpoint(tmp_path)
    other = build(optimizer={"type": "SGD", "params": {"lr": 0.1}})
    with pytest.raises(zerostack.CheckpointError, match="state of AdamW, the engine steps with SGD"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert other.global_steps == 1
    assert "betas" not in other.optimizer.param_groups[0]


def test_what_is_not_ours_is_not_replaced(tmp_path):
    engine = build()
    train(engine, 1)
    theirs = tmp_path / "global_step1"
    theirs.mkdir()
    (theirs / "mp_rank_00_model_states.pt").write_bytes(b"precious")
    with pytest.raises(
        zerostack.CheckpointError, match="is of no checkpoint of this format; it will not be replaced"
    ):
        engine.save_checkpoint(tmp_path)
    assert (theirs / "mp_rank_00_model_states.pt").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]
    engine.save_checkpoint(tmp_path, "ours")
    engine.save_checkpoint(tmp_path, "ours")


def tags_differ(rank, root, policy):
    engine = build(checkpoint={"tag_validation": policy})
    return engine.save_checkpoint(root, "ab"[rank]).name


@pytest.mark.parametrize("policy", ["Warn", "Ignore"])
def test_the_first_ranks_tag_is_used(tmp_path, policy):
    assert run_ranks(tags_differ, 2, tmp_path, policy) == ["a", "a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "latest"]


def test_a_16_bit_model_is_no_pickle(tmp_path):
    with pytest.raises(zerostack.ConfigError, match=r"ends in \.safetensors, got 'pytorch_model\.bin'"):
        build().save_16bit_model(tmp_path, "pytorch_model.bin")


def test_a_schedule_that_does_not_take_the_state_is_told_before_anything_is_loaded(tmp_path):
    engine = build(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    again = build(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    before = zero.full_state_dict(again.module)

    def refuse(state):
        raise KeyError("lr_lambdas")

    again.lr_scheduler.load_state_dict = refuse
    with pytest.raises(zerostack.CheckpointError, match="does not take the schedule's state"):
        again.load_checkpoint(tmp_path)
    assert again.global_steps == 0
    assert all(torch.equal(value, before[name]) for name, value in zero.full_state_dict(again.module).items())


class Larger(Small):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(3, 3)


def in_turn(optimizer):
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9) for _ in range(2)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])


@pytest.mark.parametrize(
    "how",
    [
        {"config": config(1, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})},
        {"config": config(1), "lr_scheduler": in_turn},
    ],
)
def test_a_load_that_fails_leaves_the_schedule_where_it_is(tmp_path, how):
    engine = zerostack.initialize(model=Small(), **how)[0]
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    other = zerostack.initialize(model=Larger(), **how)[0]
    train(other, 1)
    before = copy.deepcopy((other.get_lr(), other.lr_scheduler.state_dict()))
    assert before[0] != engine.get_lr()
    with pytest.raises(zerostack.CheckpointError, match="does not fit the model"):
        other.load_checkpoint(tmp_path)
    assert (other.get_lr(), other.lr_scheduler.state_dict()) == before
    again = zerostack.initialize(model=Small(), **how)[0]
    again.load_checkpoint(tmp_path)
    assert again.get_lr() == engine.get_lr()
    assert again.lr_scheduler.state_dict() == engine.lr_scheduler.state_dict()


def refused_on_one_rank(rank, root):
    def lambdas(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    engine = zerostack.initialize(model=Small(), config=config(1), lr_scheduler=lambdas)[0]
    train(engine, 1)
    engine.save_checkpoint(root)
    other = zerostack.initialize(model=Small(1), config=config(1), lr_scheduler=lambdas)[0]
    before = zero.full_state_dict(other.module)
    if rank == 1:
        other.lr_scheduler.load_state_dict = lambda state: state["of another version"]
    message = (
        "LambdaLR does not take" if rank == 1 else "failed on another rank.*rank 1.*LambdaLR does not take"
    )
    with pytest.raises(zerostack.CheckpointError, match=message):
        other.load_checkpoint(root)
    after = zero.full_state_dict(other.module)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_schedule_that_one_rank_does_not_take_is_told_on_all(tmp_path):
    run_ranks(refused_on_one_rank, 2, tmp_path)


class Steps:
    """A schedule with no state of its own."""

    def __init__(self):
        self.num_steps = 0

    def step(self):
        self.num_steps += 1


def test_a_schedule_without_a_state_is_in_no_checkpoint(tmp_path):
    engine = zerostack.initialize(model=Small(), config=config(1), lr_scheduler=Steps())[0]
    train(engine, 2)
    engine.save_checkpoint(tmp_path)
    again = zerostack.initialize(model=Small(), config=config(1), lr_scheduler=Steps())[0]
    again.load_checkpoint(tmp_path)
    assert (again.global_steps, again.lr_scheduler.num_steps) == (2, 0)
