"""PURE: bytes per rank under a configuration, by what they are and where they rest, before anything is allocated.

In: the effective configuration, a model or its size, and the optimizer if there is one. Out: a `Footprint`. The
formulas are zero-core's and zero-offload-nvme's; `explain` and `estimate` print them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import zero_core as zero
import zero_offload_nvme as off
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from . import policies, signs
from .lion import Lion
from .offload import zenflow
from .resolve import Effective
from .schema import Config

TIERS: dict[str, off.Tier] = {"none": "device", "cpu": "host", "nvme": "nvme"}
"""What a device of an "offload_..." section is called in a plan."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank.

    Attributes:
        nbytes: What it is -> tier -> bytes.
        assumed: What was taken for the optimizer's state, where nothing says which optimizer it is; None: it is known.
    """

    nbytes: dict[str, dict[off.Tier, int]]
    assumed: str | None

    def total(self, tier: off.Tier) -> int:
        """Bytes in a tier."""
        return sum(of.get(tier, 0) for of in self.nbytes.values())


def footprint(
    settings: Effective,
    model_or_num_params: nn.Module | float,
    optimizer: Optimizer | None = None,
    num_shards: int | None = None,
) -> Footprint:
    """Bytes per rank.

    Args:
        settings: The effective configuration.
        model_or_num_params: What is to be trained; of a number of parameters, the ZeRO paper's formula.
        optimizer: That steps; None: the configuration's.
        num_shards: Ranks that share one set of shards; None: as the configuration has it.
    """
    config, section = settings.config, settings.config.zero_optimization
    world = num_shards or settings.num_shards
    kind, assumed = _kind(config, optimizer)
    common: dict[str, Any] = {"world": world, "precision": policies.precision(config), "optimizer": kind}
    sends_signs = signs.kind_of(config, optimizer)
    nbytes: dict[str, dict[off.Tier, int]] = {}
    if section.offloads and sends_signs is None:
        tiers = offloaded(
            section.stage,
            params=section.offload_param.device,
            optimizer=section.offload_optimizer.device,
            optimizer_ratio=section.offload_optimizer.ratio,
            keep_first=section.offload_optimizer.super_offload,
            speculative=section.offload_optimizer.super_offload,
            zenflow=None if optimizer is None and config.optimizer is None else _zenflow(config, optimizer),
        )
        planned = off.plan_tiers(model_or_num_params, stage=section.stage, tiers=tiers, **common)
        for tier, kinds in planned.nbytes.items():
            for each, size in kinds.items():
                nbytes.setdefault(each, {})[tier] = size
    else:
        stage = section.stage if sends_signs is None else 0
        plain = zero.plan_memory(model_or_num_params, stage=stage, **common)
        for name in ("params", "grads", "master", "optimizer", "in_flight"):
            nbytes[name] = {"device": getattr(plain, name)}
        if sends_signs is not None:
            trained = nbytes["optimizer"]["device"] // 8  # of Adam's 8 bytes a parameter
            nbytes["optimizer"]["device"] = signs.state_bytes(config, sends_signs, world, trained)
    for name, size in _of_compression(config, model_or_num_params).items():
        nbytes[name] = {"device": size}
    return Footprint(nbytes=nbytes, assumed=assumed)


def offloaded(stage: int, *, params: str, optimizer: str, **more: Any) -> off.Tiers:
    """Where things rest: what a stage can move of what was asked for, since it shards nothing else.

    Args:
        stage: ZeRO stage.
        params: "none", "cpu" or "nvme".
        optimizer: Likewise, of masters, optimizer state and, from stage 2, gradients.
        more: As `zero_offload_nvme.Tiers`.
    """
    state = TIERS[optimizer]
    return off.Tiers(
        params=TIERS[params] if stage == 3 else "device",
        grads=state if stage >= 2 and more.get("zenflow") is None else "device",
        optimizer=state if stage >= 1 else "device",
        device="cuda",
        **more,
    )


def _kind(config: Config, optimizer: Optimizer | None) -> tuple[str, str | None]:
    """The optimizer as `zero_core.plan_memory` names it, and what is assumed where it has no name there."""
    if signs.kind_of(config, optimizer) is not None:
        return "adam", None  # counted otherwise
    if optimizer is None and config.optimizer is None:
        return "adam", "Adam's"
    if optimizer is None:
        assert config.optimizer is not None
        name, options = config.optimizer.type, [config.optimizer.params.model_dump()]
    else:
        known = {Adam: "Adam", AdamW: "AdamW", SGD: "SGD", Adagrad: "Adagrad", Lion: "Lion"}
        known |= {off.CPUAdam: "Adam", off.CPUAdamW: "AdamW", off.CPUAdagrad: "Adagrad", off.CPULion: "Lion"}
        name, options = known.get(type(optimizer), ""), optimizer.param_groups
    if not name:
        return "adam", f"Adam's, since that of {type(optimizer).__name__} is not known"
    if name in {"Adam", "AdamW"}:
        return "adam-amsgrad" if any(of["amsgrad"] for of in options) else "adam", None
    if name == "SGD" and any(of["momentum"] for of in options):
        return "sgd-momentum", None
    return name.lower(), None


def _zenflow(config: Config, optimizer: Optimizer | None) -> off.ZenFlow | None:
    made = policies.optimizer(config, [nn.Parameter(torch.zeros(1))]) if optimizer is None else optimizer
    return zenflow(config, made)


def _of_compression(config: Config, model_or_num_params: nn.Module | float) -> dict[str, int]:
    """What compressed collectives keep on the device."""
    section = config.zero_optimization
    if isinstance(model_or_num_params, nn.Module):
        params = list(model_or_num_params.parameters())
        sizes = [(param.numel(), param.dtype, param.requires_grad) for param in params]
    else:
        sizes = [(int(model_or_num_params), torch.float32, True)]
    precision = policies.precision(config)
    found = {}
    if section.keeps_secondary:
        whole = sum(
            numel * (1 if section.zero_quantized_weights else precision.param_dtype(own).itemsize)
            for numel, own, _ in sizes
        )
        found["secondary (hpZ)"] = -(-whole // section.zero_hpz_partition_size)
    if section.uses_loco:
        found["residuals (LoCo)"] = 4 * sum(numel for numel, _, trained in sizes if trained)
    return found
