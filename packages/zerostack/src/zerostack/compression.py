"""ZeRO++: how weights and gradients travel, and how frozen weights rest, as the configuration says.

In: the "zero_quantized_...", "zero_hpz_partition_size" and "zeropp_loco_param" keys. Out: collectives and a store of
comm-compress. Next: `api` shards the model over them.
"""

from __future__ import annotations

import os

import comm_compress as cc
import torch.distributed as dist

from .errors import ConfigError
from .schema import Config, Zero

_SECTION = "zero_optimization"


def check_compression(config: Config, num_ranks: int) -> None:
    """Refuse what cannot be compressed as it is asked for.

    Args:
        config: the whole configuration.
        num_ranks: that share one set of shards.

    Raises:
        ConfigError: a stage that has no such traffic, LoCo or a policy about what is not quantized, or a partition
            that does not divide the ranks.
    """
    section = config.zero_optimization
    for name, asked, stage in (
        ("zero_quantized_weights", section.zero_quantized_weights, 1),
        ("zero_quantized_nontrainable_weights", section.zero_quantized_nontrainable_weights, 3),
        ("zero_hpz_partition_size", section.keeps_secondary, 3),
    ):
        if asked and section.stage < stage:
            raise ConfigError(f"{_SECTION}.{name}: needs stage {stage} or above, got stage {section.stage}")
    quantizes = section.zero_quantized_weights or section.zero_quantized_gradients
    if section.zero_quantized_if_faster and not quantizes:
        raise ConfigError(
            f"{_SECTION}.zero_quantized_if_faster: it is about quantized weights and gradients; give "
            "zero_quantized_weights or zero_quantized_gradients true, or leave it out"
        )
    if section.uses_loco and not section.zero_quantized_gradients:
        raise ConfigError(
            f"{_SECTION}.zeropp_loco_param: it is about quantized gradients; give zero_quantized_gradients true, or "
            "leave it out"
        )
    if num_ranks % section.zero_hpz_partition_size:
        raise ConfigError(
            f"{_SECTION}.zero_hpz_partition_size: expected a divisor of the {num_ranks} ranks that share one set of "
            f"shards, got {section.zero_hpz_partition_size}"
        )


def collectives(
    config: Config, num_ranks: int, group: dist.ProcessGroup, timeout_s: float
) -> cc.QuantizedCollectives | None:
    """How bytes travel; None: as they are.

    A node is `zero_hpz_partition_size` ranks; where that is not given, as many as torchrun has started on each machine,
    if that is the same number on all and divides the ranks, which ask each other: every rank calls it.

    Args:
        config: the whole configuration.
        num_ranks: that share one set of shards.
        group: all ranks, of several sets.
        timeout_s: deadline of each.
    """
    section = config.zero_optimization
    secondary = section.keeps_secondary
    if not section.compresses:
        return None
    return cc.QuantizedCollectives(
        weights="int8" if section.zero_quantized_weights else None,
        grads="int4" if section.zero_quantized_gradients else None,
        frozen="int8" if section.zero_quantized_nontrainable_weights else None,
        node_size=section.zero_hpz_partition_size if secondary else _ranks_of_a_machine(num_ranks, group),
        secondary=secondary,
        policy="auto" if section.zero_quantized_if_faster else "always",
        loco=_loco(section),
        timeout_s=timeout_s,
    )


def frozen_store(config: Config) -> cc.QuantizedStore | None:
    """Where shards of frozen parameters rest; None: with the others."""
    return cc.QuantizedStore("int8") if config.zero_optimization.zero_quantized_nontrainable_weights else None


def _loco(section: Zero) -> cc.LoCoPolicy | None:
    asked = section.zeropp_loco_param
    return cc.LoCoPolicy(beta=asked.err_beta, reset_steps=asked.reset_T) if section.uses_loco else None


def _ranks_of_a_machine(num_ranks: int, group: dist.ProcessGroup) -> int | None:
    told = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    every = [told] * group.size()
    dist.all_gather_object(every, told, group)
    return told if told and set(every) == {told} and num_ranks % told == 0 else None
