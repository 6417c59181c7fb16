"""PURE: tiers of memory, which tier each kind of tensor rests in, and what a rank then holds and moves.

Plain records: `tier_plan` fills a `TierPlan`, `forecast` makes seconds of its `Traffic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import zero_core as zero

from .errors import OffloadConfigError
from .zenflow import ZenFlow

Tier = Literal["device", "host", "nvme"]
Kind = Literal["params", "grads", "master", "optimizer", "in_flight", "window"]
TIERS: tuple[Tier, ...] = get_args(Tier)
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Which tier each kind rests in.

    Attributes:
        params: shards of parameters (stage 3).
        grads: reduced gradients (stages 2 and 3).
        optimizer: separate masters and the optimizer's state (stages 1 to 3).
        optimizer_ratio, keep_first: as `zero_core.Stores`.
        speculative: with `OffloadedOptimizer(overlap="speculative")`, and as much room as it takes.
        zenflow: with `OffloadedOptimizer(overlap="zenflow")`, and this policy.
        device: type of the device that computes; "cpu": the device's tier is host memory too.
        window_bytes: as `OffloadedOptimizer`.
        cache_bytes: as `NvmeStore`.
    """

    params: Tier = "device"
    grads: Tier = "device"
    optimizer: Tier = "device"
    optimizer_ratio: float = 1.0
    keep_first: bool = False
    speculative: bool = False
    zenflow: ZenFlow | None = None
    device: str = "cpu"
    window_bytes: int = 192 << 20
    cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.speculative and self.zenflow is not None:
            raise OffloadConfigError("speculative, zenflow: a step has one overlap; leave one of the two out")
        for name in ("params", "grads", "optimizer"):
            if getattr(self, name) not in TIERS:
                raise OffloadConfigError(
                    f"{name}: expected one of {', '.join(TIERS)}, got {getattr(self, name)!r}"
                )
        for name in ("window_bytes", "cache_bytes"):
            if getattr(self, name) < 0:
                raise OffloadConfigError(f"{name}: expected bytes, 0 or more, got {getattr(self, name)!r}")

    def stores(self, stage: int) -> zero.Stores:
        """As zero-core sees it, with tiers in the place of stores."""
        named: dict[str, Any] = {name: getattr(self, name) for name in ("params", "grads", "optimizer")}
        stored = {name: tier for name, tier in named.items() if tier != "device"}
        stores = zero.Stores(**stored, optimizer_ratio=self.optimizer_ratio, keep_first=self.keep_first)
        return zero.Stores.of(stores, stage)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank moves.

    Attributes:
        drive_read, drive_written: by an optimizer step.
        link: between device and host, by an optimizer step.
        memory: read and written by the step's kernels on the host.
        blocks: that the step is cut into.
        parameters: that the step goes through; 0 where a number of elements is all that is known.
        params_read: from the drive, by one forward and backward.
        grads_written: to the drive, by one backward.
        grads_read: from the drive, by each backward of a step after its first.
    """

    drive_read: int = 0
    drive_written: int = 0
    link: int = 0
    memory: int = 0
    blocks: int = 0
    parameters: int = 0
    params_read: int = 0
    grads_written: int = 0
    grads_read: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class TierPlan:
    """What one rank holds, and moves.

    Attributes:
        nbytes: tier -> kind -> bytes.
        traffic: of a step.
        largest_on_drive: bytes of the largest tensor that rests on one, in pages; 0 where only a number of parameters
            is known.
    """

    stage: int
    world: int
    tiers: Tiers
    nbytes: dict[Tier, dict[Kind, int]]
    traffic: Traffic
    largest_on_drive: int = 0

    def total(self, tier: Tier) -> int:
        """Bytes in a tier."""
        return sum(self.nbytes[tier].values())

    @property
    def host_bytes(self) -> int:
        """Host memory, that of the device's tier included where the host is the device."""
        return self.total("host") + (self.total("device") if self.tiers.device == "cpu" else 0)
