"""The optimizers that send momenta as signs (comm_compress): made of a configuration, and what they cannot go with.

In: the "optimizer" section, or an optimizer that was passed. Out: one of `comm_compress`'s optimizers, on a model that
zero-core shards at stage 0 with gradients left local; ZeRO stage 1 is the optimizer's own `shard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import comm_compress as cc
import zero_core as zero
from torch.optim import Optimizer

from .errors import CheckpointError, ConfigError
from .schema import Config

KINDS: dict[str, type[cc.CompressedOptimizer]] = {
    "OneBitAdam": cc.OneBitAdam,
    "ZeroOneAdam": cc.ZeroOneAdam,
    "OneBitLamb": cc.OneBitLamb,
}


def make(
    config: Config, kind: str, params: dict[str, Any], parameters: Any, timeout_s: float
) -> cc.CompressedOptimizer:
    """The optimizer that a configuration names.

    Args:
        config: All of it.
        kind: One of `KINDS`.
        params: Its "params", `betas` a tuple.
        parameters: Parameters or groups.
        timeout_s: Deadline of its collectives.

    Raises:
        ConfigError: Values that contradict each other.
    """
    given = {name: value for name, value in params.items() if name not in {"cuda_aware", "comm_backend_name"}}
    if kind != "ZeroOneAdam":
        given["shard"] = config.zero_optimization.stage == 1
    try:
        made = KINDS[kind](parameters, **given)
    except cc.CompressConfigError as error:
        raise ConfigError(f"optimizer.params: {error}") from error
    made.compression = replace(made.compression, timeout_s=timeout_s)
    return made


def check(
    config: Config,
    optimizer: Optimizer,
    *,
    num_replicas: int,
    publish_late: bool = False,
    whole_tensors: bool | None = None,
) -> None:
    """Refuse what an optimizer of `KINDS` cannot be combined with; any other passes.

    Args:
        config: All of it.
        optimizer: That is to step.
        num_replicas: Sets of shards.
        publish_late: As `initialize`.
        whole_tensors: As `initialize`.

    Raises:
        ConfigError: With what to change.
    """
    if not isinstance(optimizer, cc.CompressedOptimizer):
        return
    name, section = type(optimizer).__name__, config.zero_optimization
    stage, shard = section.stage, bool(getattr(optimizer, "shard", False))
    wrong = {
        f"zero_optimization.stage {stage}: {name} needs every gradient and momentum whole; use stage 0 or 1, or AdamW "
        "with quantized collectives": stage > 1,
        f"zero_optimization.stage 1: {name} keeps nothing that could be sharded, since every rank steps everything at "
        "every step; use stage 0": stage == 1 and isinstance(optimizer, cc.ZeroOneAdam),
        f"zero_optimization.stage {stage} and {name}(shard={shard}): say the same in both": stage < 2
        and not isinstance(optimizer, cc.ZeroOneAdam)
        and shard != (stage == 1),
        f"offload_optimizer, offload_param: {name} steps on the device; leave them out": section.offloads,
        f"zenflow: {name} steps everything at once; leave it out": section.uses_zenflow,
        f"mics_shard_size, dp_replicate: {name} sends signs among all data-parallel ranks; leave them out": num_replicas
        > 1,
        f"bf16_master_weights_and_grads: {name} keeps fp32 states; leave it out": (
            config.bf16.bf16_master_weights_and_grads
        ),
        f"zero_quantized_..., zero_hpz_partition_size: {name} sends momenta, no gradients or weights; leave them out": (
            section.compresses
        ),
        f"publish_late: {name} gathers no parameters after its step; leave it out": publish_late,
        f"whole_tensors: {name} does its own stepping; leave it out": whole_tensors is True,
    }
    for message, holds in wrong.items():
        if holds:
            raise ConfigError(message)


def collectives(optimizer: Optimizer) -> type[cc.LocalGradients] | None:
    """How gradients travel: not at all under an optimizer of `KINDS`."""
    return cc.LocalGradients if isinstance(optimizer, cc.CompressedOptimizer) else None


def stage(config: Config, optimizer: Optimizer) -> int:
    """The stage that zero-core shards at."""
    return 0 if isinstance(optimizer, cc.CompressedOptimizer) else config.zero_optimization.stage


def kind_of(config: Config, optimizer: Optimizer | None) -> str | None:
    """Which of `KINDS` steps: the optimizer, or where there is none the one that the configuration names."""
    if optimizer is None:
        name = None if config.optimizer is None else config.optimizer.type
    else:
        name = type(optimizer).__name__
    return name if name in KINDS else None


def state_bytes(config: Config, kind: str, world: int, numel: int) -> int:
    """Bytes per rank that an optimizer of `KINDS` keeps when it keeps most."""
    params = None if config.optimizer is None else config.optimizer.params
    alone = getattr(params, "local_step_clipper", 2) > 1
    shard = config.zero_optimization.stage == 1
    return int(numel * max(cc.state_bytes(kind, world, shard=shard, steps_alone=alone)))


# -- checkpoints ----------------------------------------------------------------------------------------------


def shared_values(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Inside, parameters are the same on all ranks: between synchronizations of 0/1 Adam each has its own."""
    return optimizer.shared_values() if isinstance(optimizer, cc.ZeroCompressedOptimizer) else nullcontext()


def settle(optimizer: Optimizer) -> None:
    """Before parameters are loaded: make those of all ranks the same. Every rank calls it."""
    if isinstance(optimizer, cc.ZeroCompressedOptimizer) and isinstance(optimizer.inner, cc.ZeroOneAdam):
        optimizer.inner.synchronize()


def scalars(optimizer: Optimizer) -> dict[str, Any] | None:
    """How far such an optimizer has come, in plain values; None for any other."""
    return optimizer.compressed_scalars() if isinstance(optimizer, cc.ZeroCompressedOptimizer) else None


def described(optimizer: Optimizer) -> dict[str, zero.Shard]:
    """Its state on this rank, by name."""
    return optimizer.compressed_state() if isinstance(optimizer, cc.ZeroCompressedOptimizer) else {}


def room(optimizer: Optimizer, saved: Mapping[str, Any] | None) -> dict[str, zero.Shard]:
    """Memory for what this rank needs of a state that was saved on any number of ranks.

    Raises:
        CheckpointError: The checkpoint has another optimizer's.
    """
    if not isinstance(optimizer, cc.ZeroCompressedOptimizer) or saved is None:
        return {}
    try:
        return optimizer.compressed_room(saved)
    except cc.CompressStateError as error:
        raise CheckpointError(f"{error}, or pass load_optimizer_states=False") from error


def load(optimizer: Optimizer, saved: Mapping[str, Any] | None, filled: Mapping[str, zero.Shard]) -> None:
    """Take over what was read into `room`, once parameters and masters are loaded; every rank calls it."""
    if isinstance(optimizer, cc.ZeroCompressedOptimizer) and saved is not None:
        optimizer.load_compressed(saved, filled)
