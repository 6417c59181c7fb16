"""Configuration values -> zero-core's policies, a torch optimizer and a schedule; one small function each.

In: `resolve.Effective`. Out: objects that know nothing of JSON. Next: `api.initialize` puts them together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import zero_core as zero
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import schedules, signs
from .errors import ConfigError
from .lion import Lion
from .schema import Config

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}


def precision(config: Config) -> zero.Precision:
    """The five dtypes of training."""
    wire = "fp32" if config.fp32_allreduce else config.communication_data_type
    kept = config.data_types.grad_accum_dtype
    common: dict[str, Any] = {
        "reduce": None if wire is None else DTYPES[wire],
        "accumulate": None if kept is None else DTYPES[kept],
    }
    if config.fp16.enabled:
        return zero.Precision(compute=torch.float16, **common)
    if config.bf16.enabled:
        master = torch.bfloat16 if config.bf16.bf16_master_weights_and_grads else None
        return zero.Precision(compute=torch.bfloat16, master=master, **common)
    if config.torch_autocast.enabled:
        return zero.Precision(param=torch.float32, compute=DTYPES[config.torch_autocast.dtype], **common)
    return zero.Precision(**common)


def accumulates_reduced(config: Config) -> bool:
    """Whether gradients are to be added up in another dtype than that in which they travel: after they have."""
    policy = precision(config)
    param = policy.param_dtype(torch.float32)
    return policy.accumulate_dtype(param) != policy.reduce_dtype(param)


def overlap(config: Config, *, publish_late: bool = False, timeout_s: float | None = None) -> zero.Overlap:
    """How many bytes travel while compute goes on, and for how long.

    What is not given, or is without meaning here, is zero-core's own.
    """
    section = config.zero_optimization
    wanted = section.overlap_comm
    if publish_late and wanted is False:
        raise ConfigError(
            "publish_late=True leaves gathers under way, and overlap_comm is false; leave one out"
        )
    limits: dict[str, Any] = {} if timeout_s is None else {"timeout_s": timeout_s}
    if wanted is False:
        return zero.Overlap(enabled=False, **limits)
    policy = precision(config)
    param = policy.param_dtype(torch.float32)
    if section.reduce_bucket_size is not None:
        limits["reduce_bytes"] = section.reduce_bucket_size * policy.reduce_dtype(param).itemsize
    if section.stage3_prefetch_bucket_size is not None and section.stage == 3:
        limits["prefetch_bytes"] = section.stage3_prefetch_bucket_size * param.itemsize
    return zero.Overlap(publish_late=publish_late, **limits)


def loss_scaler(config: Config) -> zero.LossScaler | None:
    """float16: a dynamic or static scale. bf16 with `check_grad_overflow`: a scale of 1, for the check alone."""
    fp16 = config.fp16
    in_float16 = fp16.enabled or (config.torch_autocast.enabled and config.torch_autocast.dtype == "float16")
    if in_float16 and fp16.loss_scale:
        return zero.LossScaler(fp16.loss_scale, dynamic=False)
    if in_float16:
        return zero.LossScaler(
            2.0**fp16.initial_scale_power,
            growth_interval=fp16.loss_scale_window,
            hysteresis=fp16.hysteresis,
            consecutive_hysteresis=fp16.consecutive_hysteresis,
            min_scale=fp16.min_loss_scale,
        )
    if config.bf16.enabled and config.bf16.check_grad_overflow:
        return zero.LossScaler(1.0, dynamic=False)
    return None


def optimizer(
    config: Config, parameters: Iterable[Any], *, timeout_s: float = zero.Overlap.timeout_s
) -> Optimizer:
    """The optimizer that the configuration names, over parameters or parameter groups.

    Args:
        config: All of it.
        parameters: Parameters or groups.
        timeout_s: Deadline of collectives, for an optimizer that has some of its own.

    Raises:
        ConfigError: If it names none.
    """
    if config.optimizer is None:
        raise ConfigError('no optimizer: give initialize(optimizer=...) or an "optimizer" section')
    kind = config.optimizer.type
    params = config.optimizer.params.model_dump()
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    if kind in signs.KINDS:
        return signs.make(config, kind, params, parameters, timeout_s)
    params.pop("bias_correction")
    if kind in {"Adam", "AdamW"}:
        params.pop("torch_adam")
        decoupled = params.pop("adam_w_mode")
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, **params)
    classes: dict[str, type[Optimizer]] = {
        "SGD": torch.optim.SGD,
        "Adagrad": torch.optim.Adagrad,
        "Lion": Lion,
    }
    return classes[kind](parameters, **params)


def check_same(config: Config, given: Optimizer) -> None:
    """Refuse an "optimizer" section that says something else than the optimizer that was passed.

    Raises:
        ConfigError: With every value that differs.
    """
    if config.optimizer is None:
        return
    section = config.optimizer
    differing = []
    if type(given).__name__.lower() not in {section.type.lower(), "adamw" if section.type == "Adam" else ""}:
        differing.append(f"type {section.type!r} and {type(given).__name__}")
    for name in section.params.model_fields_set & set(given.defaults):
        value, passed = getattr(section.params, name), given.defaults[name]
        if value != (list(passed) if isinstance(passed, tuple) else passed):
            differing.append(f"{name} {value!r} and {passed!r}")
    if differing:
        raise ConfigError(
            'the "optimizer" section and initialize(optimizer=...) differ in '
            + ", ".join(differing)
            + '; leave one of the two out, or write "auto"'
        )


def check_rates(config: Config, optimizer: Optimizer) -> None:
    """Refuse a schedule with another number of rates than the optimizer has parameter groups.

    Raises:
        ConfigError: If so.
    """
    if config.scheduler is None:
        return
    groups = len(optimizer.param_groups)
    for name, value in config.scheduler.params.model_dump().items():
        if isinstance(value, list) and len(value) != groups:
            raise ConfigError(
                f"scheduler.params.{name}: expected one rate or {groups} (one a parameter group), got {len(value)}"
            )


def scheduler(config: Config, attached_to: Optimizer) -> LRScheduler | None:
    """The schedule that the configuration names, if any."""
    if config.scheduler is None:
        return None
    kind: type[LRScheduler] = getattr(schedules, config.scheduler.type)
    return kind(attached_to, **config.scheduler.params.model_dump())
