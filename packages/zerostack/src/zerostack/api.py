"""`initialize`: the order of application on one page.

In: a model and a configuration, with DeepSpeed's argument names. On the way: process group -> effective
configuration -> sharded model -> sharded optimizer -> schedule -> loader. Out: an `Engine`. Nothing is decided here
that `policies` or `resolve` decides.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import zero_core as zero
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from . import policies, signs
from .auto import Surroundings
from .checks import check
from .compression import collectives
from .distributed import data_parallel_mesh, init_distributed, with_replicas
from .engine import Engine
from .errors import ConfigError
from .explain import explain
from .facts import Parts
from .loader import EpochLoader
from .offload import sharded_optimizer, stores, zenflow
from .resolve import Effective, effective

log = logging.getLogger(__name__)

MakesOptimizer = Callable[[Iterable[Any]], Optimizer]
MakesScheduler = Callable[[Optimizer], LRScheduler]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | MakesOptimizer | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | DataLoader[Any] | None = None,
    lr_scheduler: LRScheduler | MakesScheduler | None = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    mesh_device: DeviceMesh | None = None,
    config_params: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    whole_tensors: bool | None = None,
    placement: zero.Placement | None = None,
    publish_late: bool = False,
    timeout_s: float | None = None,
) -> tuple[Engine, zero.ShardedOptimizer, EpochLoader | DataLoader[Any] | None, LRScheduler | None]:
    """Shard a model and its optimizer over the data-parallel ranks; all ranks call it.

    Args:
        args: The program's arguments; `args.deepspeed_config` is the configuration where none is given.
        model: The model; on the CPU, on this rank's device, or on the meta device. It is sharded in place.
        optimizer: A torch optimizer on the model's parameters, or a function that makes one of them; None takes
            the configuration's "optimizer".
        model_parameters: Parameters or parameter groups for that optimizer; None means all that require gradients.
        training_data: A dataset (a loader is made of it), or a loader of micro-batches (returned as it is).
        lr_scheduler: A schedule, or a function that makes one of the optimizer; None takes the configuration's.
        distributed_port: Port of the rendezvous where MASTER_PORT does not say.
        mpu: Not supported: model parallelism is a dimension of a mesh here.
        dist_init_required: False: torch.distributed is initialised already.
        collate_fn: Makes a batch of samples, for the loader made of `training_data`.
        config: Path of a JSON file, or a dictionary, with DeepSpeed's keys.
        mesh_device: A mesh whose only dimension, or whose dimension "dp", is sharded over, or that has "dp_replicate"
            and "dp_shard"; None means all ranks.
        config_params: An older name of `config`.
        whole_tensors: True for an optimizer from elsewhere that looks at whole parameters, such as LAMB; torch's own
            (Adafactor, Muon) are known.
        placement: Stage 3: what stays whole between uses.
        publish_late: Stages 1 and 2: `step` returns while updated parameters are on their way; their use waits for
            them. For slow networks and accelerators; see `zero_core.Overlap`.
        timeout_s: Seconds after which a rank that does not come is an error (on the CPU; on an accelerator the
            deadline of the process group counts, which is this one where `initialize` makes the group); None is
            zero-core's own. Raise it where one rank works alone for longer. An optimizer that is passed and has
            collectives of its own keeps its own.

    Returns:
        (engine, optimizer, loader, schedule).

    Raises:
        ConfigError: If the configuration, or something passed beside it, cannot be honoured; nothing has happened
            to the model then. A schedule that was passed and raises says so, too, and by then the model is sharded.
    """
    source = _only_config(args, config, config_params)
    if model is None:
        raise ConfigError("initialize: model is missing")
    if mpu is not None:
        raise ConfigError("mpu: known DeepSpeed argument; pass mesh_device= with a dimension 'dp' instead")
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise ConfigError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
    init_distributed(
        distributed_port=distributed_port,
        timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
        dist_init_required=dist_init_required,
    )
    mesh = data_parallel_mesh(mesh_device)
    group = zero.data_parallel_group(mesh)
    given_loader = training_data if isinstance(training_data, DataLoader) else None
    given_optimizer = optimizer if isinstance(optimizer, Optimizer) else None
    around = Surroundings(
        world=group.size(),
        model=model,
        optimizer=given_optimizer,
        args=args,
        micro_batch=None if given_loader is None else given_loader.batch_size,
    )
    settings = effective(source, around)
    _check_loader(settings, given_loader, collate_fn)
    mesh = with_replicas(
        mesh, settings.config.zero_optimization.mics_shard_size, given=mesh_device is not None
    )
    overlap = policies.overlap(settings.config, publish_late=publish_late, timeout_s=timeout_s)
    made = _optimizer(settings, model, optimizer, model_parameters, overlap.timeout_s)
    _check_parameters(model, made)
    num_shards = zero.sharding_group(mesh).size()
    check(
        settings.config,
        made,
        num_shards=num_shards,
        num_replicas=group.size() // num_shards,
        model=model,
        placement=placement,
        publish_late=publish_late,
        whole_tensors=whole_tensors,
    )
    if lr_scheduler is not None and settings.config.scheduler is not None:
        raise ConfigError(
            'both initialize(lr_scheduler=...) and a "scheduler" section are given; leave one out'
        )
    scaler = policies.loss_scaler(settings.config)
    compressed = collectives(settings.config, num_shards, group, overlap.timeout_s)
    late = zenflow(settings.config, made)
    loader = None
    if training_data is not None and not isinstance(training_data, DataLoader):
        loader = EpochLoader(
            training_data,
            batch_size=settings.batch.micro,
            rank=group.rank(),
            world=group.size(),
            seed=settings.config.seed,
            drop_last=settings.config.dataloader_drop_last,
            collate_fn=collate_fn,
        )

    model = zero.shard(
        model,
        mesh,
        stage=signs.stage(settings.config, made),
        precision=policies.precision(settings.config),
        collectives=signs.collectives(made) or compressed,
        overlap=overlap,
        placement=placement,
        store=stores(settings.config),
    )
    sharded = sharded_optimizer(settings.config, model, made, scaler, whole_tensors, late)
    scheduler = _scheduler(settings, sharded, lr_scheduler)
    kind = mesh.device_type
    device = torch.device(kind)
    if kind != "cpu":
        device = torch.device(kind, torch.get_device_module(kind).current_device())
    parts = Parts(
        module=model,
        optimizer=sharded,
        scheduler=scheduler,
        scaler=scaler,
        loader=loader,
        settings=settings,
        group=group,
        device=device,
        collectives=compressed,
    )
    if settings.config.dump_state and group.rank() == 0:
        log.info("%s", explain(settings, model, made, num_shards))
    return Engine(parts), sharded, loader if loader is not None else given_loader, scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add DeepSpeed's `--deepspeed` and `--deepspeed_config` to a parser; returns the parser."""
    group = parser.add_argument_group("zerostack", "configuration")
    group.add_argument("--deepspeed", action="store_true", help="train with the configuration below")
    group.add_argument("--deepspeed_config", default=None, type=str, help="JSON file with DeepSpeed's keys")
    return parser


def _only_config(args: Any, config: Any, config_params: Any) -> str | os.PathLike[str] | Mapping[str, Any]:
    from_args = getattr(args, "deepspeed_config", None)
    named = {"config": config, "config_params": config_params, "args.deepspeed_config": from_args}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigError(f"give one configuration as config=PATH or config={{...}}; got {found}")
    source: str | os.PathLike[str] | Mapping[str, Any] = next(iter(given.values()))
    return source


def _check_loader(
    settings: Effective, loader: DataLoader[Any] | None, collate_fn: Callable[[list[Any]], Any] | None
) -> None:
    """Refuse what a loader that is ready cannot take over any more."""
    if loader is None:
        return
    if collate_fn is not None:
        raise ConfigError(
            "collate_fn: training_data is a DataLoader, which has one of its own; leave one of the two out"
        )
    if loader.batch_size not in {None, settings.batch.micro}:
        raise ConfigError(
            f"train_micro_batch_size_per_gpu is {settings.batch.micro} and the DataLoader's batch_size is "
            f'{loader.batch_size}; make them equal, or write "auto"'
        )


def _optimizer(
    settings: Effective,
    model: nn.Module,
    given: Optimizer | MakesOptimizer | None,
    parameters: Iterable[Any] | None,
    timeout_s: float,
) -> Optimizer:
    if isinstance(given, Optimizer):
        made = given
    else:
        trainable = (
            [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
        )
        made = (
            policies.optimizer(settings.config, trainable, timeout_s=timeout_s)
            if given is None
            else given(trainable)
        )
    if given is not None:
        policies.check_same(settings.config, made)
    return made


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer of other parameters, or of none that is trained."""
    own = {id(param) for param in model.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    foreign = [tuple(param.shape) for param in params if id(param) not in own]
    if foreign:
        raise ConfigError(
            f"optimizer, model_parameters: {len(foreign)} parameter(s), of shapes {foreign[:4]}, are not the model's; "
            "pass parameters of the very model that is to be trained"
        )
    if not any(param.requires_grad for param in params):
        raise ConfigError(
            "optimizer, model_parameters: every parameter is frozen; set requires_grad on what is to be trained"
        )


def _scheduler(
    settings: Effective, optimizer: zero.ShardedOptimizer, given: LRScheduler | MakesScheduler | None
) -> LRScheduler | None:
    if given is None:
        return policies.scheduler(settings.config, optimizer)
    if isinstance(given, LRScheduler) or not callable(given):
        return given
    try:
        return given(optimizer)
    except Exception as error:
        raise ConfigError(
            f"initialize(lr_scheduler=...) raised {type(error).__name__}: {error}; the model is sharded by now: build "
            "model and optimizer anew before another try"
        ) from error
