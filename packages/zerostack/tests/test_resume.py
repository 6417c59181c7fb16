"""A checkpoint goes on as if nothing had happened: on other worlds, at other stages, in another precision."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
import zero_core as zero
import zerostack
from zero_core.testing import run_ranks
from zerostack_models import Small, batch, config

BEFORE, AFTER = 3, 3
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5}}


def build(stage, seed=0, model=None, optimizer=None, **more):
    raw = config(stage, scheduler=SCHEDULE, **more)
    if isinstance(optimizer, dict):
        raw["optimizer"], optimizer = optimizer, None
    elif optimizer:
        del raw["optimizer"]
    model = Small(seed) if model is None else model
    return zerostack.initialize(model=model, optimizer=optimizer, config=raw)[0]


def train(engine, first, steps):
    """All ranks get the same samples, so that losses do not depend on how many there are."""
    losses = []
    for step in range(first, first + steps):
        loss = engine(batch(step, rank=0))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    "Lion": {"type": "Lion", "params": {"lr": 0.01}},
    "SGD": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "Adafactor": torch.optim.Adafactor,  # whole tensors, whose state has shapes of its own
}


def save_rank(rank, root, stages):
    """For each stage and optimizer, a checkpoint; returns the losses that follow it."""
    expected = {}
    for stage in stages:
        for kind, optimizer in OPTIMIZERS.items():
            engine = build(stage, optimizer=optimizer)
            before = train(engine, 0, BEFORE)
            tag = f"{engine.world_size}-{stage}-{kind}"
            engine.save_checkpoint(root, tag, client_state={"epoch": 7, "notes": ("a", torch.ones(2))})
            expected[tag] = train(engine, BEFORE, AFTER)
            assert expected[tag][0] != before[0]
    return expected


def load_rank(rank, root, stage, expected):
    for tag, losses in expected.items():
        engine = build(stage, seed=99, optimizer=OPTIMIZERS[tag.rpartition("-")[2]])
        path, client_state = engine.load_checkpoint(root, tag)
        assert path.endswith(tag)
        assert client_state["epoch"] == 7
        assert client_state["notes"][0] == "a"
        assert torch.equal(client_state["notes"][1], torch.ones(2))
        assert engine.global_steps == BEFORE
        assert train(engine, BEFORE, AFTER) == pytest.approx(losses, rel=2e-6), (tag, stage)
        assert int(engine.module.calls) == BEFORE + AFTER


def test_losses_go_on_on_other_worlds_and_stages(tmp_path):
    expected = run_ranks(save_rank, 2, tmp_path, (0, 1, 3))[0]
    expected |= run_ranks(save_rank, 3, tmp_path, (2, 3))[0]
    for world, stage in [(1, 1), (1, 3), (2, 0), (2, 2), (3, 1), (3, 3)]:
        run_ranks(load_rank, world, tmp_path, stage, expected)


class Other(Small):
    def __init__(self):
        super().__init__()
        self.extra = torch.nn.Linear(3, 3)


class Wider(Small):
    def __init__(self):
        super().__init__()
        self.blocks[1].up = torch.nn.Linear(16, 8)
        self.blocks[1].down = torch.nn.Linear(8, 16)


def mismatch_rank(rank, root):
    engine = build(3)
    train(engine, 0, 2)
    engine.save_checkpoint(root)

    for model, message in [
        (
            Other(),
            r"missing there: 'extra.bias', 'extra.weight'; not in the model: nothing; pass load_module_strict",
        ),
        (Wider(), r"blocks\.1\.(up|down).*: \(.*\) in the state, \(.*\) in the checkpoint"),
    ]:
        wrong = build(2, model=model)
        before = zero.full_state_dict(wrong.module)
        with pytest.raises(zerostack.CheckpointError, match=message):
            wrong.load_checkpoint(root)
        after = zero.full_state_dict(wrong.module)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert wrong.global_steps == 0

    loose = build(1, model=Other())
    loose.load_checkpoint(root, load_module_strict=False, load_optimizer_states=False)
    saved = zero.full_state_dict(engine.module)
    loaded = zero.full_state_dict(loose.module)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)

    only = build(3, seed=5)
    assert only.load_checkpoint(root, load_module_only=True)[0] is not None
    assert only.global_steps == 0
    assert only.get_lr() == [0.0]
    assert torch.equal(zero.full_state_dict(only.module)["embed.weight"], saved["embed.weight"])
    assert not any(name.endswith("exp_avg") for name in zero.sharded_state(only.module, only.optimizer))

    torch.manual_seed(rank)
    engine.save_checkpoint(root, "rng")
    expected = torch.rand(3)
    torch.manual_seed(50)
    engine.load_checkpoint(root, "rng")
    assert torch.equal(torch.rand(3), expected)

    assert engine.load_checkpoint(root / "empty") == (None, {})
    with pytest.raises(
        zerostack.CheckpointError, match=r"absent: no committed .*; present: global_step2, rng"
    ):
        engine.load_checkpoint(root, "absent")
    with pytest.raises(
        zerostack.CheckpointError, match=r"engine\.client_state.*when: a builtins.object cannot be"
    ):
        engine.save_checkpoint(root, "bad", client_state={"when": object()})
    strict = build(0, checkpoint={"tag_validation": "Fail"})
    with pytest.raises(zerostack.CheckpointError, match="different tags: 'a', 'b'"):
        strict.save_checkpoint(root, "ab"[rank])
    return sorted(p.name for p in root.iterdir())


def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path):
    assert run_ranks(mismatch_rank, 2, tmp_path) == [["global_step2", "latest", "rng"]] * 2


def precision_rank(rank, root):
    low = build(2, bf16={"enabled": True})
    train(low, 0, BEFORE)
    low.save_checkpoint(root, "low")
    low.save_16bit_model(root / "export")
    high = build(3, seed=5)
    high.load_checkpoint(root, "low")
    masters = {
        n: s.local for n, s in zero.sharded_state(low.module, low.optimizer).items() if n.endswith("master")
    }
    assert masters
    exact = zero.full_state_dict(high.module)
    rounded = zero.full_state_dict(low.module)
    assert any(
        not torch.equal(exact[name], rounded[name].float()) for name in exact
    )  # fp32 came from the masters
    for name in exact:
        assert torch.equal(exact[name].to(rounded[name].dtype), rounded[name])
    high.save_checkpoint(root, "high")
    again = build(1, seed=6, bf16={"enabled": True})
    again.load_checkpoint(root, "high")
    assert train(again, BEFORE, AFTER) == pytest.approx(train(low, BEFORE, AFTER), rel=1e-2)

    half = build(1, fp16={"enabled": True, "initial_scale_power": 4})
    train(half, 0, 1)
    half.parts.scaler.value = 128.0
    half.save_checkpoint(root, "half")
    other = build(3, fp16={"enabled": True})
    other.load_checkpoint(root, "half")
    assert other.loss_scale == other.cur_scale == 128.0
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in rounded.items()}


def test_precision_may_change_and_the_16_bit_model_is_plain(tmp_path):
    described = run_ranks(precision_rank, 2, tmp_path)[0]
    plain = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in plain.items()} == described
    assert plain["embed.weight"].dtype == torch.bfloat16
    assert torch.equal(plain["head.weight"], plain["embed.weight"])
    Small().load_state_dict(plain)
