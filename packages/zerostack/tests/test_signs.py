"""OneBitAdam, ZeroOneAdam and OneBitLamb in the JSON configuration: training, checkpoints, and what they refuse."""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import zero_core as zero
import zerostack
from zero_core.testing import run_ranks
from zerostack.errors import CheckpointError, ConfigError
from zerostack_models import Small, batch, config

STEPS = 9
TYPES = {
    "OneBitAdam": {"freeze_step": 4},
    "OneBitLamb": {"freeze_step": 4, "max_coeff": 5.0, "factor_threshold": 0.2},
    "ZeroOneAdam": {
        "var_freeze_step": 4, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 3,
    },
}  # fmt: skip


def raw(kind, stage=0, params=None, **more):
    common = {"lr": 0.01, "weight_decay": 0.1, "cuda_aware": False, "comm_backend_name": "nccl"}
    section = {"type": kind, "params": {**common, **TYPES[kind], **(params or {})}}
    return {**config(stage, **more), "optimizer": section}


def build(kind, stage=0, seed=0, params=None, **more):
    return zerostack.initialize(model=Small(seed), config=raw(kind, stage, params, **more))[0]


def train(engine, rank, first, steps):
    losses = []
    for step in range(first, first + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = engine(batch(10 * step + micro, rank))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    return losses


def values(engine):
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def beside_a_plain_loop(rank, kind, stage):
    """The engine steps as comm_compress alone does, accumulation and clipping included."""
    engine = build(kind, stage, gradient_accumulation_steps=2)
    assert isinstance(engine.optimizer, cc.ZeroCompressedOptimizer)
    assert type(engine.optimizer.inner).__name__ == kind
    assert engine.zero_optimization_stage() == stage
    model = Small()
    shard = {} if kind == "ZeroOneAdam" else {"shard": stage == 1}
    plain = getattr(cc, kind)(model.parameters(), lr=0.01, weight_decay=0.1, **TYPES[kind], **shard)
    plain.agrees_always = True
    for step in range(STEPS):
        train(engine, rank, step, 1)
        for micro in range(2):
            (model(batch(10 * step + micro, rank)) / 2).backward()
        norm = plain.clip_grad_norm(0.5)
        plain.step()
        plain.zero_grad()
        assert engine.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-4)
        for name, value in model.named_parameters():
            torch.testing.assert_close(values(engine)[name], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("OneBitAdam", 0), ("OneBitAdam", 1), ("OneBitLamb", 0), ("OneBitLamb", 1), ("ZeroOneAdam", 0)],
)
def test_steps_are_those_of_a_plain_loop(kind, stage):
    run_ranks(beside_a_plain_loop, 2, kind, stage)


def precisions(rank, kind, section):
    engine = build(kind, **section)
    losses = train(engine, rank, 0, STEPS)
    engine.eval()
    with engine.optimizer.shared_values():
        return losses, values(engine), engine.skipped_steps


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize(
    "section",
    [{"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
     {"fp16": {"enabled": True, "initial_scale_power": 8}}, {"torch_autocast": {"enabled": True}}],
)  # fmt: skip
def test_mixed_precision(kind, section):
    ranks = run_ranks(precisions, 2, kind, section)
    for losses, parameters, skipped in ranks:
        assert losses[-1] < losses[0]
        assert skipped == 0
        assert all(torch.equal(parameters[name], ranks[0][1][name]) for name in parameters)


# -- checkpoints --------------------------------------------------------------------------------------------------

AT = (2, 6, 8)  # warm-up; compressed; later (0/1 Adam: between synchronizations at least once)


def save(rank, root, kind, stage, more):
    engine = build(kind, stage, **more)
    found, alone = {}, []
    for step in range(12):
        loss = train(engine, rank, step, 1)
        for at in found:
            found[at].append(loss[0])
        if step + 1 in AT:
            engine.save_checkpoint(root, f"{kind}-{stage}-{step + 1}")
            found[step + 1] = []
            alone.append(kind == "ZeroOneAdam" and engine.optimizer.inner.steps_since_sync > 0)
    assert any(alone) == (kind == "ZeroOneAdam")
    return found


def load(rank, root, kind, stage, more, expected):
    for at, losses in expected.items():
        engine = build(kind, stage, seed=9, **more)
        path, _ = engine.load_checkpoint(root, f"{kind}-{stage}-{at}")
        assert path is not None
        assert engine.global_steps == engine.optimizer.inner.num_steps == at
        assert train(engine, rank, at, 12 - at) == losses  # bit for bit


@pytest.mark.parametrize(
    ("kind", "stage", "more"),
    [("OneBitAdam", 0, {}), ("OneBitAdam", 1, {"bf16": {"enabled": True}}), ("OneBitLamb", 1, {}),
     ("ZeroOneAdam", 0, {}), ("ZeroOneAdam", 0, {"bf16": {"enabled": True}})],
)  # fmt: skip
def test_resume_is_bit_for_bit(kind, stage, more, tmp_path):
    expected = run_ranks(save, 2, tmp_path, kind, stage, more)
    for rank in (0, 1):
        assert all(len(losses) == 12 - at for at, losses in expected[rank].items())
    run_ranks(load_of_rank, 2, tmp_path, kind, stage, more, expected)


def load_of_rank(rank, root, kind, stage, more, expected):
    load(rank, root, kind, stage, more, expected[rank])


def load_elsewhere(rank, root, kind, stage):
    found = {}
    for at in AT:
        engine = build(kind, stage, seed=9)
        engine.load_checkpoint(root, f"{kind}-0-{at}")
        assert engine.optimizer.inner.num_steps == at
        losses = train(engine, rank, at, 4)
        assert all(torch.isfinite(torch.tensor(losses)))
        with engine.optimizer.shared_values():
            found[at] = values(engine)
    return found


@pytest.mark.parametrize(("kind", "stage"), [("OneBitAdam", 1), ("OneBitLamb", 0), ("ZeroOneAdam", 0)])
@pytest.mark.parametrize("world", [1, 3])
def test_resume_on_another_number_of_ranks(kind, stage, world, tmp_path):
    run_ranks(save, 2, tmp_path, kind, 0, {})
    ranks = run_ranks(load_elsewhere, world, tmp_path, kind, stage)
    for found in ranks:
        for at in AT:
            assert all(torch.equal(found[at][name], value) for name, value in ranks[0][at].items())


def others(rank, root):
    adam = zerostack.initialize(model=Small(), config=config(1))[0]
    train(adam, rank, 0, 2)
    adam.save_checkpoint(root, "adam")
    engine = build("OneBitAdam")
    with pytest.raises(CheckpointError, match="holds the state of AdamW, the engine steps with OneBitAdam"):
        engine.load_checkpoint(root, "adam")
    engine.load_checkpoint(root, "adam", load_optimizer_states=False)
    assert engine.optimizer.inner.num_steps == 0
    saved = zero.full_state_dict(adam.module)
    assert all(torch.equal(saved[name], value) for name, value in zero.full_state_dict(engine.module).items())
    train(engine, rank, 2, 6)
    engine.save_checkpoint(root, "signs")
    adam.load_checkpoint(root, "signs", load_module_only=True)
    saved = zero.full_state_dict(engine.module)
    assert all(torch.equal(saved[name], value) for name, value in zero.full_state_dict(adam.module).items())
    engine.save_16bit_model(root)


def test_checkpoints_of_others(tmp_path):
    run_ranks(others, 2, tmp_path)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("solo")
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("OneBitAdam", {"zero_optimization": {"stage": 2}}, "stage 2: OneBitAdam needs every gradient"),
        ("OneBitLamb", {"zero_optimization": {"stage": 3}}, "stage 3: OneBitLamb needs every gradient"),
        (
            "ZeroOneAdam",
            {"zero_optimization": {"stage": 1}},
            "stage 1: ZeroOneAdam keeps nothing that could be sharded",
        ),
        (
            "OneBitAdam",
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer, offload_param: OneBitAdam steps on the device",
        ),
        (
            "OneBitAdam",
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
            "bf16_master_weights_and_grads: OneBitAdam keeps fp32 states",
        ),
    ],
)
def test_combinations_that_cannot_be(kind, change, message):
    model = Small()
    with pytest.raises(ConfigError, match=message):
        zerostack.initialize(model=model, config={**raw(kind), **change})
    model(batch(0, 0))  # untouched


@pytest.mark.usefixtures("solo")
@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("OneBitAdam", {"freeze_step": 0}, "optimizer.params.freeze_step: expected at least 1, got 0"),
        ("OneBitAdam", {"var_freeze_step": 3}, "var_freeze_step: expected only the names of OneBitAdam"),
        ("ZeroOneAdam", {"local_step_clipper": 0.5}, "local_step_clipper: expected a whole number, got 0.5"),
        ("OneBitLamb", {"factor_threshold": 1.0}, "factor_threshold: expected less than 1"),
        (
            "OneBitLamb",
            {"min_coeff": 20.0},
            "optimizer.params: OneBitLamb: expected 0 < min_coeff <= max_coeff",
        ),
        ("OneBitLamb", {"comm_backend_name": 1}, "comm_backend_name: expected a string, got 1"),
    ],
)
def test_values_that_cannot_be(kind, params, message):
    with pytest.raises(ConfigError, match=message):
        zerostack.initialize(model=Small(), config=raw(kind, params=params))


@pytest.mark.usefixtures("solo")
def test_one_that_was_passed():
    model = Small()
    made = cc.OneBitAdam(model.parameters(), lr=0.01, shard=True)
    plain = {name: value for name, value in config(0).items() if name != "optimizer"}
    with pytest.raises(ConfigError, match=r"stage 0 and OneBitAdam\(shard=True\): say the same in both"):
        zerostack.initialize(model=model, optimizer=made, config=plain)
    plain["zero_optimization"] = {"stage": 1}
    engine = zerostack.initialize(model=model, optimizer=made, config=plain)[0]
    assert engine.optimizer.inner is made
    again = Small()
    other = cc.OneBitAdam(again.parameters(), shard=True)
    with pytest.raises(ConfigError, match="publish_late: OneBitAdam gathers no parameters"):
        zerostack.initialize(model=again, optimizer=other, config=plain, publish_late=True)


@pytest.mark.usefixtures("solo")
def test_null_freezes_when_the_variance_has_settled_and_bias_may_stay():
    engine = build("OneBitAdam", params={"freeze_step": None, "bias_correction": False})
    inner = engine.optimizer.inner
    assert inner.rule.freeze_step is None
    assert inner.param_groups[0]["bias_correction"] is False
    with pytest.raises(ConfigError, match=r"params\.bias_correction: expected True, got False"):
        zerostack.initialize(
            model=Small(),
            config={**config(0), "optimizer": {"type": "AdamW", "params": {"bias_correction": False}}},
        )


@pytest.mark.usefixtures("solo")
def test_what_has_no_effect_is_said_and_bytes_are_counted():
    engine = build("ZeroOneAdam")
    text = zerostack.explain.explain(engine.parts.settings, 1e6)
    assert "optimizer.params.comm_backend_name  signs travel through the process group" in " ".join(
        text.split(" ")
    )
    optimizer = next(line for line in text.splitlines() if line.startswith("optimizer "))
    assert (
        "24 MB" in optimizer
    )  # alone: 8 + 4 + 4 of momentum, divisor, drift and common values, 8 of residuals
