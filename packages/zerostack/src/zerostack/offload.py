"""Where optimizer state and parameters rest between uses, as the configuration says, and what steps them there.

In: "offload_optimizer", "offload_param", "zenflow" and "aio". Out: zero-core's `Stores`, over which `api` shards the
model, and its optimizer.
"""

from __future__ import annotations

from typing import Any, Literal

import accel_kernels as ak
import comm_compress as cc
import torch
import zero_core as zero
from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from zero_core.units import find_units
from zero_offload_nvme import (
    HostStore,
    NvmeStore,
    OffloadConfigError,
    OffloadedOptimizer,
    StoreStepper,
    ZenFlow,
)

from . import policies
from .compression import frozen_store
from .errors import ConfigError
from .schema import Aio, Config, Offload

Store = HostStore | NvmeStore


def check_offload(config: Config) -> None:
    """Refuse what cannot rest where it is asked to.

    Raises:
        ConfigError: a stage that does not shard it, a drive without a path, or `super_offload` of nothing.
    """
    section = config.zero_optimization
    if section.offload_optimizer.super_offload and (
        section.offload_optimizer.device == "none" or not section.offload_optimizer.ratio
    ):
        raise ConfigError(
            "zero_optimization.offload_optimizer.super_offload: no optimizer state is offloaded; "
            'give device ("cpu" or "nvme") and a ratio above 0, or leave it out'
        )
    for name, asked, stage in (
        ("offload_optimizer", section.offload_optimizer, 1),
        ("offload_param", section.offload_param, 3),
    ):
        path = f"zero_optimization.{name}"
        if asked.device == "none":
            continue
        if section.stage < stage:
            raise ConfigError(f"{path}: needs stage {stage} or above, got stage {section.stage}")
        if asked.device == "nvme" and not asked.nvme_path:
            raise ConfigError(
                f'{path}.device is "nvme", and {path}.nvme_path is missing: name a folder of a fast drive'
            )


def check_stepped(
    config: Config,
    optimizer: Optimizer,
    whole_tensors: bool | None,
    model: nn.Module | None,
    placement: zero.Placement | None,
) -> None:
    """Refuse, before the model changes, what cannot be stepped where it is to rest; None: it is not known yet.

    Raises:
        ConfigError: the state is to be offloaded, and no kernel steps this optimizer block by block, or such masters;
            or `super_offload` or ZenFlow is asked for, and the ratio leaves all optimizer state on the device.
    """
    section = config.zero_optimization
    if not section.offloads:
        return
    if zero.steps_whole_tensors(optimizer, whole_tensors):
        raise ConfigError(
            f"offload_optimizer, offload_param: {type(optimizer).__name__} looks at whole tensors, and offloaded "
            "state is stepped block by block; use AdamW, Adam, Adagrad, Lion or SGD"
        )
    try:
        StoreStepper(optimizer)
    except OffloadConfigError as error:
        raise ConfigError(f"offload_optimizer, offload_param: {error}") from error
    policy = policies.precision(config)
    params = [] if model is None else [param for param in model.parameters() if param.requires_grad]
    masters = {policy.master_dtype(dtype) for dtype in {param.dtype for param in params} or {torch.float32}}
    if wrong := masters - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wrong))
        raise ConfigError(
            f"offload_optimizer, offload_param: kernels step fp32 masters, and these are {names}; leave "
            "bf16_master_weights_and_grads out, or train without offload"
        )
    if model is None or not (section.offload_optimizer.super_offload or section.uses_zenflow):
        return
    units = find_units(model, whole=None if placement is None else placement.whole_modules)
    sizes = [sum(param.numel() for _, param in unit.params) * unit.trainable for unit in units]
    ratio, keep_first = section.offload_optimizer.ratio, section.offload_optimizer.super_offload
    stores: Any = "the device of offload_optimizer"  # of_units hands it on
    planned = zero.Stores(optimizer=stores, optimizer_ratio=ratio, keep_first=keep_first).of_units(sizes)
    if not any(size and each.optimizer is not None for size, each in zip(sizes, planned, strict=True)):
        raise ConfigError(
            f"offload_optimizer.ratio: {ratio} of {sum(sizes)} trainable elements is less than any whole unit that may "
            "go, and all optimizer state would stay on the device; give a larger ratio, or leave super_offload and "
            "zenflow out"
        )


def zenflow(config: Config, optimizer: Optimizer) -> ZenFlow | None:
    """What the section "zenflow" asks for; None: an exact step.

    Raises:
        ConfigError: values that do not go together, `super_offload`, optimizer state that rests on the device, or an
            optimizer whose moments cannot be carried between steps now and steps later.
    """
    section, path = config.zero_optimization.zenflow, "zero_optimization.zenflow"
    if not config.zero_optimization.uses_zenflow:
        return None
    asked_for = config.zero_optimization.offload_optimizer
    if asked_for.super_offload:
        raise ConfigError(
            f"{path} and zero_optimization.offload_optimizer.super_offload: each says when states are stepped; leave "
            "one of the two out"
        )
    if asked_for.device == "none" or not asked_for.ratio:
        raise ConfigError(
            f"{path}: all optimizer state rests on the device, where nothing would be late; give "
            'zero_optimization.offload_optimizer {"device": "cpu"} or "nvme", or leave zenflow out'
        )
    if type(optimizer) not in (Adam, AdamW):
        raise ConfigError(
            f"{path}: expected Adam or AdamW, got {type(optimizer).__name__}; leave zenflow out"
        )
    if section.select_strategy == "epoch" and section.steps_per_epoch is None:
        raise ConfigError(
            f'{path}.steps_per_epoch: select_strategy is "epoch"; give the number of optimizer steps of an epoch: '
            "samples / train_batch_size"
        )
    asked = section.model_dump(exclude={"pt_reserved_cores_perc"})
    if section.update_interval != "auto":
        del asked["auto_ratio"]
    try:
        return ZenFlow(**asked)
    except OffloadConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def stores(config: Config) -> zero.Stores | None:
    """Make the stores that are asked for; None: everything stays on the device.

    Reduced gradients rest with the optimizer state, as in ZeRO-Offload; under ZenFlow they are summed in host memory.

    Raises:
        OffloadDiskError: a folder cannot be written.
    """
    section = config.zero_optimization
    made: dict[tuple[str, str | None, bool], Store] = {}

    def store(asked: Offload) -> Store | None:
        if asked.device == "none":
            return None
        key = (asked.device, asked.nvme_path if asked.device == "nvme" else None, asked.pin_memory)
        if key not in made:
            made[key] = _make(asked, config.aio)
        return made[key]

    optimizer, params = store(section.offload_optimizer), store(section.offload_param)
    frozen = frozen_store(config)
    if optimizer is None and params is None and frozen is None:
        return None
    if optimizer is None:
        return zero.Stores(params=params, frozen=frozen)
    return zero.Stores(
        params=params,
        frozen=frozen,
        grads=optimizer if section.stage >= 2 and not section.uses_zenflow else None,
        optimizer=optimizer,
        optimizer_ratio=section.offload_optimizer.ratio,
        keep_first=section.offload_optimizer.super_offload,
    )


def sharded_optimizer(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: zero.LossScaler | None,
    whole_tensors: bool | None,
    late: ZenFlow | None,
) -> zero.ShardedOptimizer:
    """The optimizer of a sharded model, which steps what is offloaded where it rests.

    Raises:
        ConfigError: `super_offload` or ZenFlow (`late`), and the ratio leaves all optimizer state on the device.
    """
    if isinstance(optimizer, cc.CompressedOptimizer):
        return cc.ZeroCompressedOptimizer(model, optimizer, scaler=scaler)
    if not config.zero_optimization.offloads:
        return zero.ShardedOptimizer(model, optimizer, scaler=scaler, whole_tensors=whole_tensors)
    overlap: Literal["exact", "speculative", "zenflow"] = "exact" if late is None else "zenflow"
    if config.zero_optimization.offload_optimizer.super_offload:
        overlap = "speculative"
    try:
        return OffloadedOptimizer(model, optimizer, overlap=overlap, zenflow=late, scaler=scaler)
    except OffloadConfigError as error:
        raise ConfigError(f"offload_optimizer: {error}") from error


def _make(asked: Offload, aio: Aio) -> Store:
    pin = None if asked.pin_memory else False
    if asked.device == "cpu":
        return HostStore(pin=pin)
    assert asked.nvme_path is not None  # check_offload
    engine = ak.TransferEngine(
        queue_depth=aio.queue_depth, block_bytes=aio.block_size, num_threads=max(4, aio.thread_count)
    )
    return NvmeStore(asked.nvme_path, engine=engine, pin=pin)
