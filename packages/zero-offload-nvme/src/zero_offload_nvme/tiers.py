"""PURE: what a run will hold in each tier, and what an optimizer step will move between them, before any of it exists.

In: a model or a number of parameters, and which tier each kind rests in. Out: bytes per rank by tier and kind, and the
traffic of a step. The sizes are `zero_core.plan_memory`'s, unit by unit. Next: `forecast` makes seconds of the traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import zero_core as zero
from torch import nn
from zero_core.layout import plan_layout
from zero_core.memory import STATE_BYTES
from zero_core.units import UnitChoice, find_units

from .blocks import DEPTH, block_elements
from .errors import OffloadConfigError

Tier = Literal["device", "host", "nvme"]
Kind = Literal["params", "grads", "master", "optimizer", "in_flight", "window"]
TIERS: tuple[Tier, ...] = get_args(Tier)
KINDS: tuple[Kind, ...] = get_args(Kind)
STEPPED = ("adam", "adamw", "adagrad", "sgd", "sgd-momentum")
"""What `StoreStepper` has kernels for, as `zero_core.plan_memory` names it."""
PAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Which tier each kind rests in.

    Attributes:
        params: shards of parameters (stage 3).
        grads: reduced gradients (stages 2 and 3).
        optimizer: separate masters and the optimizer's state (stages 1 to 3).
        optimizer_ratio, keep_first: as `zero_core.Stores`.
        speculative: with `OffloadedOptimizer(overlap="speculative")`, and as much room as it takes.
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
    device: str = "cpu"
    window_bytes: int = 192 << 20
    cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
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
    """

    stage: int
    world: int
    tiers: Tiers
    nbytes: dict[Tier, dict[Kind, int]]
    traffic: Traffic

    def total(self, tier: Tier) -> int:
        """Bytes in a tier."""
        return sum(self.nbytes[tier].values())

    @property
    def host_bytes(self) -> int:
        """Host memory, that of the device's tier included where the host is the device."""
        return self.total("host") + (self.total("device") if self.tiers.device == "cpu" else 0)


@dataclass(frozen=True)
class _Sized:
    """A unit's elements, padding included, and what its parameters are."""

    numel: int
    params: torch.dtype
    trainable: bool
    parameters: int = 0


@dataclass
class _Sum:
    """What has been counted so far."""

    nbytes: dict[Tier, dict[Kind, int]] = field(
        default_factory=lambda: {tier: dict.fromkeys(KINDS, 0) for tier in TIERS}
    )

    def hold(self, tier: Tier, kind: Kind, nbytes: int, tensors: int = 1) -> None:
        """So many tensors of one size; on a drive each begins on a page."""
        if tier == "nvme" and tensors:
            nbytes = tensors * (-(-nbytes // (tensors * PAGE)) * PAGE)
        self.nbytes[tier][kind] += nbytes


def plan_tiers(
    model_or_n_params: nn.Module | int | float,
    *,
    stage: int,
    world: int,
    tiers: Tiers,
    precision: zero.Precision | None = None,
    optimizer: str = "adamw",
    units: UnitChoice = None,
) -> TierPlan:
    """Bytes per rank by tier and kind, and the traffic of an optimizer step.

    Args:
        model_or_n_params: a model on any device, the meta device too: to the byte what `zero_core.shard` and
            `OffloadedOptimizer` will hold, but for what is in flight, which is `zero_core.plan_memory`'s. Or a number:
            the ZeRO paper's formula.
        stage: as `zero_core.plan_memory`.
        world: likewise.
        tiers: where things rest.
        precision: as `zero_core.plan_memory`.
        optimizer: as `zero_core.plan_memory`; of those, what has kernels on the host if its state rests in a store.
        units: as `zero_core.plan_memory`.

    Raises:
        OffloadConfigError, zero_core.ZeroConfigError: an argument out of range, or a stage that does not shard what is
            to rest in a store.
    """
    whole = zero.plan_memory(
        model_or_n_params, stage=stage, world=world, precision=precision, optimizer=optimizer, units=units
    )
    if tiers.optimizer != "device" and optimizer not in STEPPED:
        raise OffloadConfigError(
            f"optimizer: expected one of {', '.join(STEPPED)} where its state rests in a store, got {optimizer!r}"
        )
    stores = tiers.stores(stage)
    if isinstance(model_or_n_params, nn.Module):
        precision = precision or zero.Precision()
        sized, sizes = [], []
        for spec in find_units(model_or_n_params, units):
            shapes = [tuple(param.shape) for _, param in spec.params]
            layout = plan_layout([names for names, _ in spec.params], shapes, world)
            dtype = precision.param_dtype(spec.params[0][1].dtype)
            sized.append(_Sized(layout.numel, dtype, spec.trainable, len(spec.params)))
            sizes.append(sum(param.numel() for _, param in spec.params) * spec.trainable)
    else:
        precision = precision or zero.Precision(compute=torch.bfloat16)
        numel, part = int(model_or_n_params), round(int(model_or_n_params) * tiers.optimizer_ratio)
        sizes = [each for each in (part, numel - part) if each]
        sized = [_Sized(each, precision.param_dtype(torch.float32), True) for each in sizes]

    found, traffic = _Sum(), Traffic()
    most = max((len(list(_operands(unit, stores, stage, precision, optimizer))) for unit in sized), default=1)
    for unit, its in zip(sized, stores.of_units(sizes), strict=True):
        as_in_paper = not isinstance(model_or_n_params, nn.Module)
        _hold(found, unit, its, stage, world, precision, optimizer, as_in_paper=as_in_paper)
        if tiers.speculative:
            _hold_shadow(found, unit, its, world, precision, optimizer)
        elements = block_elements(tiers.window_bytes, most)
        traffic += _traffic(unit, its, stage, world, precision, optimizer, tiers.device, elements)
    found.hold("device", "in_flight", whole.in_flight)
    found.hold("host", "window", _window(sized, stores, stage, precision, optimizer, tiers, most))
    on_drive = found.nbytes["nvme"]["params"]
    found.hold("host", "in_flight", min(tiers.cache_bytes, on_drive))
    return TierPlan(stage=stage, world=world, tiers=tiers, nbytes=found.nbytes, traffic=traffic)


def _own_precision(unit: _Sized, precision: zero.Precision) -> zero.Precision:
    """The same dtypes for a number of parameters, whose own dtype nobody knows."""
    return zero.Precision(
        param=unit.params,
        reduce=precision.reduce_dtype(unit.params),
        accumulate=precision.accumulate_dtype(unit.params),
        master=precision.master_dtype(unit.params),
    )


def _hold(
    found: _Sum,
    unit: _Sized,
    stores: zero.Stores,
    stage: int,
    world: int,
    precision: zero.Precision,
    optimizer: str,
    *,
    as_in_paper: bool,
) -> None:
    if not unit.numel:
        return None
    if not unit.params.is_floating_point:
        shard = -(-unit.numel // world) if stage == 3 else unit.numel
        return found.hold(_tier(stores.params), "params", shard * unit.params.itemsize)
    own = _own_precision(unit, precision)
    plan = zero.plan_memory(unit.numel, stage=stage, world=world, precision=own, optimizer=optimizer)
    # See zero_core.flat_unit, Note [One resting copy]: on the device, a separate master is all that stays.
    near = stores.params is None and stores.optimizer is None
    rests_as_master = near and stage == 3 and plan.master and unit.trainable and not as_in_paper
    found.hold(_tier(stores.params), "params", 0 if rests_as_master else plan.params)
    if unit.trainable:
        found.hold(_tier(stores.grads), "grads", plan.grads)
        found.hold(_tier(stores.optimizer), "master", plan.master)
        found.hold(_tier(stores.optimizer), "optimizer", plan.optimizer, STATE_BYTES[optimizer] // 4)
    return None


def _hold_shadow(
    found: _Sum, unit: _Sized, stores: zero.Stores, world: int, precision: zero.Precision, optimizer: str
) -> None:
    """What a step writes before it counts, see `shadow`: beside what it will replace, or in host memory."""
    if stores.optimizer is None or not (unit.trainable and unit.numel):
        return
    numel, num_states = -(-unit.numel // world), STATE_BYTES[optimizer] // 4
    master = precision.master_dtype(unit.params)
    num_states += master != unit.params
    found.hold(_tier(stores.optimizer), "in_flight", 4 * numel * num_states, num_states)
    params = "host" if stores.params is None else _tier(stores.params)
    found.hold(params, "in_flight", numel * unit.params.itemsize)


@dataclass(frozen=True)
class _Moved:
    """One operand of `StoreStepper`'s kernel: bytes an element read and written, and where they rest."""

    tier: Tier
    read: int
    written: int


def _operands(
    unit: _Sized, stores: zero.Stores, stage: int, precision: zero.Precision, optimizer: str
) -> Iterator[_Moved]:
    """Master, gradient, states and (where there is one) the low-precision shard, in the kernel's order."""
    if not (unit.trainable and unit.numel):
        return
    master = precision.master_dtype(unit.params)
    separate = master != unit.params
    params = _tier(stores.params)
    yield _Moved(_tier(stores.optimizer) if separate else params, master.itemsize, master.itemsize)
    yield _Moved(_tier(stores.grads), precision.accumulate_dtype(unit.params).itemsize, 0)
    for _ in range(STATE_BYTES[optimizer] // 4):
        yield _Moved(_tier(stores.optimizer), 4, 4)
    if separate:
        yield _Moved(params, 0, unit.params.itemsize)


def _traffic(
    unit: _Sized,
    stores: zero.Stores,
    stage: int,
    world: int,
    precision: zero.Precision,
    optimizer: str,
    device: str,
    elements: int,
) -> Traffic:
    numel = -(-unit.numel // world) if stage else unit.numel
    operands = list(_operands(unit, stores, stage, precision, optimizer))
    on_host = device == "cpu" or stores.optimizer is not None
    drive = [each for each in operands if each.tier == "nvme"]
    near = [each for each in operands if each.tier == "device" and device != "cpu" and on_host]
    params = numel * unit.params.itemsize if _tier(stores.params) == "nvme" else 0
    grads = 0
    if _tier(stores.grads) == "nvme" and unit.trainable:
        grads = numel * precision.accumulate_dtype(unit.params).itemsize
    return Traffic(
        drive_read=numel * sum(each.read for each in drive),
        drive_written=numel * sum(each.written for each in drive),
        link=numel * sum(each.read + each.written for each in near),
        memory=numel * sum(each.read + each.written for each in operands) * on_host,
        blocks=-(-numel // elements) if operands else 0,
        parameters=-(-unit.parameters // world) * unit.trainable,
        # Gathered for the forward, and for the backward again.
        params_read=2 * params,
        grads_written=grads,
        grads_read=grads,
    )


def _window(
    sized: list[_Sized],
    stores: zero.Stores,
    stage: int,
    precision: zero.Precision,
    optimizer: str,
    tiers: Tiers,
    most: int,
) -> int:
    """Memory for blocks of what is neither in host memory nor on a device that the host is."""
    if stores.optimizer is None or not tiers.optimizer_ratio:
        return 0
    passing = max(
        (
            sum(
                each.tier == "nvme" or (each.tier == "device" and tiers.device != "cpu")
                for each in _operands(unit, stores, stage, precision, optimizer)
            )
            for unit in sized
        ),
        default=0,
    )
    return DEPTH * passing * block_elements(tiers.window_bytes, most) * 4


def _tier(store: Any) -> Tier:
    """The tier that stands in a store's place."""
    tier: Tier = "device" if store is None else store
    return tier
