"""`initialize` takes DeepSpeed's arguments, and refuses what it cannot do before it touches the model."""

from __future__ import annotations

import argparse
import json
import logging

import pytest
import torch
import zero_core as zero
import zerostack
from torch.utils.data import DataLoader, Dataset
from zerostack.errors import ConfigError, EngineStateError
from zerostack.lion import Lion
from zerostack_models import Small, batch, config

pytestmark = pytest.mark.usefixtures("solo")


class Numbers(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.full((6,), index)


def test_the_call_and_what_it_returns(tmp_path):
    path = tmp_path / "ds.json"
    raw = config(3, scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4}})
    path.write_text(json.dumps(raw))
    parser = zerostack.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    model = Small()
    engine, optimizer, loader, scheduler = zerostack.initialize(
        args=args, model=model, training_data=Numbers()
    )
    assert engine.module is model
    assert engine.optimizer is optimizer
    assert isinstance(optimizer, zero.ShardedOptimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert scheduler is engine.lr_scheduler
    assert engine.get_lr() == [0.0]
    assert loader is engine.training_dataloader
    assert len(loader) == 5
    assert engine.zero_optimization_stage() == 3
    assert (engine.world_size, engine.global_rank, engine.local_rank) == (1, 0, 0)
    assert engine.device == torch.device("cpu")
    assert not engine.fp16_enabled()
    assert not engine.bfloat16_enabled()
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (2, 1)
    assert engine.train_micro_batch_size_per_gpu() == 2
    assert engine.loss_scale == 1.0
    assert engine.get_global_grad_norm() is None
    for tokens in loader:
        engine.backward(engine(tokens))
        engine.step()
    assert engine.global_steps == 5
    assert engine.get_lr()[0] > 0
    assert engine.get_global_grad_norm() > 0
    assert int(engine.calls) == 5  # whatever is not the engine's is the model's
    with pytest.raises(AttributeError):
        _ = engine.no_such_thing


def test_epochs_differ_and_are_the_same_again_with_the_same_seed():
    def orders(seed):
        raw = config(0, seed=seed)
        loader = zerostack.initialize(model=Small(), config=raw, training_data=Numbers())[2]
        return [torch.cat(list(loader))[:, 0].tolist() for _ in range(2)]

    first, again, other = orders(1), orders(1), orders(2)
    assert first == again
    assert first[0] != first[1]
    assert other != first
    assert sorted(first[0]) == list(range(10))


def test_a_loader_answers_auto_and_is_returned():
    given = DataLoader(Numbers(), batch_size=5)
    raw = config(1, micro="auto")
    engine, _, loader, _ = zerostack.initialize(model=Small(), config=raw, training_data=given)
    assert loader is given
    assert engine.train_micro_batch_size_per_gpu() == 5


def test_optimizers_and_schedules_may_be_objects_or_functions():
    def without(stage):
        raw = config(stage)
        del raw["optimizer"]
        return raw

    model = Small()
    mine = torch.optim.AdamW(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(mine, step_size=1, gamma=0.1)
    engine, optimizer, _, _ = zerostack.initialize(
        model=model, optimizer=mine, lr_scheduler=schedule, config=without(3)
    )
    engine.backward(engine(batch(0, 0)))
    engine.step()
    assert engine.get_lr() == [pytest.approx(0.05)]
    assert optimizer.inner is mine

    engine, optimizer, _, schedule = zerostack.initialize(
        model=Small(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.25, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 / (1 + step)
        ),
        config=without(2),
    )
    engine.backward(engine(batch(0, 0)))
    engine.step()
    assert engine.get_lr() == [0.125]

    groups = Small()
    decayed = [p for p in groups.parameters() if p.dim() > 1]
    plain = [p for p in groups.parameters() if p.dim() <= 1]
    parameters = [{"params": decayed}, {"params": plain, "weight_decay": 0.0, "lr": 0.5}]
    engine, _, _, _ = zerostack.initialize(model=groups, model_parameters=parameters, config=config(3))
    assert engine.get_lr() == [0.01, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one configuration as config=PATH or config={...}; got none"),
        ({"config": {}, "config_params": {}}, "got config and config_params"),
        ({"config": config(1), "mpu": object()}, "mpu: known DeepSpeed argument; pass mesh_device"),
        (
            {"config": {"train_batch_size": 2}},
            'no optimizer: give initialize\\(optimizer=...\\) or an "optimizer"',
        ),
        (
            {
                "config": config(1, scheduler={"type": "WarmupLR", "params": {}}),
                "lr_scheduler": lambda optimizer: None,
            },
            "both initialize\\(lr_scheduler=...\\) and a",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_changes(arguments, message):
    model = Small()
    with pytest.raises(ConfigError, match=message.replace("{", "\\{")):
        zerostack.initialize(model=model, **arguments)
    with pytest.raises(ConfigError, match="model is missing"):
        zerostack.initialize(config=config(1))


def test_an_optimizer_that_contradicts_the_configuration_is_refused():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with pytest.raises(ConfigError, match=r"differ in type 'AdamW' and SGD, .*lr 0\.01 and 0\.5"):
        zerostack.initialize(model=model, optimizer=optimizer, config=config(1))
    raw = config(1, optimizer={"type": "SGD", "params": {"lr": "auto", "momentum": "auto"}})
    with pytest.raises(ConfigError, match=r'optimizer\.params\.momentum: "auto" is not understood here'):
        zerostack.initialize(model=model, optimizer=optimizer, config=raw)
    del raw["optimizer"]["params"]["momentum"]
    zerostack.initialize(model=model, optimizer=optimizer, config=raw)


def test_nothing_passed_beside_the_configuration_is_ignored():
    model = Small()
    with pytest.raises(ConfigError, match="differ in type 'AdamW' and SGD"):
        zerostack.initialize(model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config(1))
    loader = DataLoader(Numbers(), batch_size=5)
    with pytest.raises(ConfigError, match="per_gpu is 2 and the DataLoader's batch_size is 5"):
        zerostack.initialize(model=model, training_data=loader, config=config(1))
    with pytest.raises(ConfigError, match="collate_fn: training_data is a DataLoader"):
        zerostack.initialize(
            model=model, training_data=DataLoader(Numbers(), batch_size=2), collate_fn=list, config=config(1)
        )
    rates = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}
    with pytest.raises(
        ConfigError, match=r"scheduler\.params\.warmup_max_lr: expected one rate or 1 .* got 2"
    ):
        zerostack.initialize(model=model, config=config(1, scheduler=rates))
    zerostack.initialize(model=model, config=config(1))  # none of them had touched the model


def test_optimizers_that_cannot_be_stepped_are_refused_before_the_model_changes():
    raw = config(2)
    del raw["optimizer"]
    model = Small()
    with pytest.raises(zero.ZeroConfigError, match="LBFGS looks at all parameters at once"):
        zerostack.initialize(model=model, optimizer=torch.optim.LBFGS, config=raw)
    with pytest.raises(zero.ZeroConfigError, match="Adafactor updates whole tensors, and a rank steps flat"):
        zerostack.initialize(model=model, optimizer=torch.optim.Adafactor, config=raw, whole_tensors=False)
    zerostack.initialize(model=model, config=config(2))


def test_what_is_wrong_with_parameters_and_data_is_found_before_the_model_changes():
    model, other = Small(), Small()
    with pytest.raises(ConfigError, match=r"of shapes .* are not the model's"):
        zerostack.initialize(model=model, model_parameters=other.parameters(), config=config(3))
    stranger = torch.optim.AdamW([*model.parameters(), *other.blocks.parameters()], lr=0.01, weight_decay=0.1)
    with pytest.raises(ConfigError, match="are not the model's; pass parameters of the very model"):
        zerostack.initialize(model=model, optimizer=stranger, config=config(3))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        zerostack.initialize(model=model, model_parameters=model.parameters(), config=config(3))
    model.requires_grad_(True)
    with pytest.raises(TypeError):
        zerostack.initialize(model=model, training_data=object(), config=config(3))
    zerostack.initialize(model=model, config=config(3))  # none of them had touched the model


def test_a_schedule_that_raises_says_what_has_happened_to_the_model():
    def schedule(optimizer):
        raise KeyError("steps")

    with pytest.raises(ConfigError, match=r"raised KeyError: 'steps'; the model is sharded by now") as error:
        zerostack.initialize(model=Small(), lr_scheduler=schedule, config=config(1))
    assert isinstance(error.value.__cause__, KeyError)


def test_lion_is_the_lion_of_its_paper():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(7))
    expected, average = parameter.detach().clone(), torch.zeros(7)
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    for _ in range(3):
        parameter.grad = torch.randn(7)
        update = (0.9 * average + 0.1 * parameter.grad).sign() + 0.2 * expected
        expected -= 0.1 * update
        average = 0.99 * average + 0.01 * parameter.grad
        optimizer.step()
    assert torch.allclose(parameter.detach(), expected, rtol=1e-5)


def test_step_needs_a_backward():
    engine = zerostack.initialize(model=Small(), config=config(2))[0]
    with pytest.raises(EngineStateError, match=r"step\(\) before backward\(\)"):
        engine.step()


def test_zero_grad_before_every_micro_batch_drops_and_says_so_and_trains(caplog):
    engine = zerostack.initialize(model=Small(), config=config(2, gradient_accumulation_steps=3))[0]
    expected = zerostack.initialize(model=Small(), config=config(2))[0]
    for step in range(2):
        for micro in range(3):
            engine.zero_grad()
            loss = engine(batch(3 * step + micro, 0))
            engine.backward(loss)
            engine.step()
        expected.backward(
            expected(batch(3 * step + 2, 0)) / 3
        )  # the last one's gradients are all that is left
        expected.step()
    assert (engine.micro_steps, engine.global_steps) == (6, 2)
    values = zero.full_state_dict(expected.module)
    assert all(
        torch.equal(value, values[name])
        for name, value in zero.full_state_dict(engine.module).items()
        if name != "calls"
    )
    told = [record.getMessage() for record in caplog.records if "zero_grad() drops" in record.getMessage()]
    assert len(told) == 1
    assert "of 1 of the 3 micro-batches" in told[0]


def test_an_overflow_is_skipped_with_its_schedule_and_reported(caplog):
    raw = config(2, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    raw["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    engine = zerostack.initialize(model=Small(), config=raw)[0]
    engine.backward(engine(batch(0, 0)) * float("inf"))
    before = zero.full_state_dict(engine.module)
    engine.step()
    assert (engine.skipped_steps, engine.global_steps, engine.loss_scale) == (1, 1, 128.0)
    assert engine.lr_scheduler.last_epoch == 0
    assert "step 1 skipped" in caplog.text
    after = zero.full_state_dict(engine.module)
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.backward(engine(batch(1, 0)))
    engine.step()
    assert (engine.skipped_steps, engine.lr_scheduler.last_epoch) == (1, 1)


def test_a_step_that_raises_may_be_called_again(monkeypatch):
    made = [
        zerostack.initialize(model=Small(), config=config(2, gradient_accumulation_steps=2)) for _ in "ab"
    ]
    (engine, optimizer, *_), (expected, *_) = made
    for each in (engine, expected):
        each.backward(each(batch(0, 0)))
        each.step()
        each.backward(each(batch(1, 0)))
    expected.step()

    def full(closure=None):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", full)
        with pytest.raises(OSError, match="No space left"):
            engine.step()
    assert (engine.micro_steps, engine.global_steps, engine.global_samples) == (1, 0, 0)
    engine.step()
    assert engine.progress == expected.progress
    values = zero.full_state_dict(expected.module)
    assert all(torch.equal(v, values[name]) for name, v in zero.full_state_dict(engine.module).items())


def test_an_overflow_at_the_least_scale_leaves_the_engine_where_it_was():
    fp16 = {"enabled": True, "initial_scale_power": 0, "hysteresis": 1}
    engine = zerostack.initialize(model=Small(), config=config(1, fp16=fp16))[0]
    engine.backward(engine(batch(0, 0)) * float("inf"))
    for _ in range(2):
        with pytest.raises(OverflowError):
            engine.step()
        assert (engine.micro_steps, engine.global_steps) == (0, 0)
    engine.zero_grad()
    engine.backward(engine(batch(1, 0)))
    engine.step()
    assert (engine.micro_steps, engine.global_steps, engine.skipped_steps) == (1, 1, 0)


def test_bf16_skips_a_step_that_is_not_finite():
    engine = zerostack.initialize(model=Small(), config=config(1, bf16={"enabled": True}))[0]
    engine.backward(engine(batch(0, 0)) * float("nan"))
    engine.step()
    assert engine.skipped_steps == 1
    assert all(torch.isfinite(value).all() for value in zero.full_state_dict(engine.module).values())


def test_progress_lines_say_what_was_asked_for(caplog):
    caplog.set_level(logging.INFO, logger="zerostack")
    raw = config(1, steps_per_print=2, wall_clock_breakdown=True, memory_breakdown=True, dump_state=True)
    engine = zerostack.initialize(model=Small(), config=raw)[0]
    assert "Effective configuration for 1 rank(s)" in caplog.text
    assert "Bytes per rank, stage 1" in caplog.text
    caplog.clear()
    for step in range(4):
        engine.backward(engine(batch(step, 0)))
        engine.step()
    lines = [record.getMessage() for record in caplog.records if record.name == "zerostack.engine"]
    assert len(lines) == 2
    for words in (
        "step 4",
        "skipped 0",
        "lr 0.01",
        "samples/s",
        "forward",
        "backward",
        "step",
        "ms",
        "peak memory",
    ):
        assert words in lines[1]


@pytest.mark.parametrize("asked", ["wall_clock_breakdown", "memory_breakdown", "dump_state"])
def test_a_breakdown_is_told_even_where_progress_is_not(caplog, asked):
    caplog.set_level(logging.INFO, logger="zerostack")
    engine = zerostack.initialize(model=Small(), config=config(1, steps_per_print=None, **{asked: True}))[0]
    for step in range(20):
        engine.backward(engine(batch(step, 0)))
        engine.step()
    lines = [record.getMessage() for record in caplog.records if record.name == "zerostack.engine"]
    assert [line.split(",")[0] for line in lines] == (["step 10", "step 20"] if "breakdown" in asked else [])


def test_an_engine_is_itself_and_hands_arguments_to_its_schedule():
    class Told(torch.optim.lr_scheduler.StepLR):
        def step(self, told=None):
            super().step()
            self.told = told

    make = lambda optimizer: Told(optimizer, 1)  # noqa: E731
    engine = zerostack.initialize(model=Small(), config=config(1), lr_scheduler=make)[0]
    engine.backward(engine(batch(0, 0)))
    engine.step(lr_kwargs={"told": 7})
    assert engine.lr_scheduler.told == 7
    assert {engine: 1}[engine] == 1


def test_evaluation_and_no_sync():
    engine = zerostack.initialize(model=Small(), config=config(3))[0]
    engine.eval()
    assert not engine.module.training
    with torch.no_grad():
        assert engine(batch(0, 0)).item() > 0
    engine.train()
    assert engine.module.training
    with engine.no_sync():
        engine.backward(engine(batch(0, 0)))
    engine.step()
    assert engine.global_steps == 1


def test_two_engines_in_one_process():
    engines = [zerostack.initialize(model=Small(), config=config(stage))[0] for stage in (3, 1)]
    losses = []
    for engine in engines:
        found = []
        for step in range(3):
            loss = engine(batch(step, 0))
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
