""" "auto" is answered from what the program has, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from zerostack.auto import Surroundings, paths
from zerostack.errors import ConfigError
from zerostack.key_table import TABLE
from zerostack.resolve import effective

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": "auto",
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": "auto",
    },
}


def model(dtype=torch.float32, width=None):
    module = torch.nn.Linear(2, 2, dtype=dtype)
    if width is not None:
        module.config = SimpleNamespace(hidden_size=width)
    return module


def test_everything_is_answered_from_trainer_arguments_and_the_model():
    args = SimpleNamespace(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=3e-4,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.1,
        warmup_steps=10,
        max_steps=100,
    )
    result = effective(AUTO, Surroundings(world=2, model=model(torch.bfloat16, 64), args=args))
    config = result.config
    assert (result.batch.train, result.batch.micro, result.batch.accumulation) == (16, 4, 2)
    assert config.gradient_clipping == 0.5
    assert config.optimizer.params.lr == config.scheduler.params.warmup_max_lr == 3e-4
    assert config.scheduler.params.total_num_steps == 100
    assert config.bf16.enabled
    assert not config.fp16.enabled
    zero = config.zero_optimization
    assert (zero.reduce_bucket_size, zero.stage3_prefetch_bucket_size) == (4096, 3686)
    assert zero.stage3_param_persistence_threshold == 640
    assert result.sources["bf16.enabled"] == "auto: the model's parameters are bfloat16"
    assert result.sources["optimizer.params.lr"] == "auto: args.learning_rate"


def test_the_optimizer_answers_before_the_arguments():
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25, betas=(0.5, 0.6))
    raw = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}
    args = SimpleNamespace(learning_rate=1.0)
    result = effective(raw, Surroundings(model=module, optimizer=optimizer, args=args))
    assert result.config.optimizer.params.lr == 0.25
    assert result.config.optimizer.params.betas == [0.5, 0.6]


def test_what_nothing_answers_is_refused_by_name():
    with pytest.raises(ConfigError) as error:
        effective(AUTO, Surroundings(model=model()))
    message = str(error.value)
    for path in ("optimizer.params.lr", "scheduler.params.total_num_steps", "train_micro_batch_size_per_gpu"):
        assert f'{path}: "auto" is taken from' in message
    assert "zero_optimization.reduce_bucket_size" not in message  # a model without a width: the default


def test_auto_where_it_means_nothing_is_refused():
    with pytest.raises(ConfigError, match=r'zero_optimization\.stage: "auto" is not understood here'):
        effective({"train_batch_size": 1, "zero_optimization": {"stage": "auto"}}, Surroundings())


def test_without_a_program_auto_stays_open_and_says_so():
    result = effective(AUTO, Surroundings(world=2), strict=False)
    assert "at initialize()" in result.sources["optimizer.params.lr"]
    assert {path: value for path, value, _ in result.rows()}["scheduler.params.total_num_steps"] == "auto"


def test_every_auto_path_is_a_documented_key():
    assert all(TABLE.get(path) is not None for path, _ in paths())


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"warmup_steps": 0, "warmup_ratio": 0.03, "max_steps": 1010}, 31),
        ({"warmup_steps": 7, "warmup_ratio": 0.03, "max_steps": 1010}, 7),
        ({"warmup_steps": 0, "warmup_ratio": 0.0, "max_steps": 1010}, 0),
    ],
)
def test_a_warm_up_may_be_a_ratio(given, steps):
    raw = {
        "train_batch_size": 1,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": 0.1}},
    }
    result = effective(raw, Surroundings(model=model(), args=SimpleNamespace(**given)))
    assert result.config.scheduler.params.warmup_num_steps == steps


def test_a_ratio_of_steps_that_nobody_knows_is_refused():
    raw = {"train_batch_size": 1, "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    args = SimpleNamespace(warmup_steps=0, warmup_ratio=0.1, max_steps=-1)
    with pytest.raises(ConfigError, match="warmup_ratio and max_steps"):
        effective(raw, Surroundings(model=model(), args=args))


def test_auto_that_is_a_value_of_its_own_stays():
    auto = {"select_strategy": "auto", "select_interval": "auto", "update_interval": "auto"}
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": auto}
    result = effective({"train_batch_size": 1, "zero_optimization": zero}, Surroundings(model=model()))
    section = result.config.zero_optimization.zenflow
    assert (section.select_strategy, section.select_interval, section.update_interval) == ("auto",) * 3
