"""PURE: what a run will hold in each tier, and what an optimizer step will move between them, before any of it exists.

In: a model or a number of parameters, and which tier each kind rests in. Out: bytes per rank by tier and kind, and the
traffic of a step. The sizes are `zero_core.plan_memory`'s, unit by unit. Next: `forecast` makes seconds of the traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zero_core as zero
from torch import nn
from zero_core.layout import plan_layout
from zero_core.memory import STATE_BYTES
from zero_core.units import UnitChoice, find_units

from .blocks import DEPTH, block_elements
from .errors import OffloadConfigError
from .tiers import KINDS, TIERS, Kind, Tier, TierPlan, Tiers, Traffic
from .zenflow import ZenFlow

STEPPED = ("adam", "adamw", "adagrad", "lion", "sgd", "sgd-momentum")
"""What `StoreStepper` has kernels for, as `zero_core.plan_memory` names it."""
PAGE = 4096


@dataclass(frozen=True)
class _Job:
    """What is the same for every unit.

    Attributes:
        as_in_paper: a number of parameters is all that is known.
    """

    stage: int
    world: int
    precision: zero.Precision
    optimizer: str
    tiers: Tiers
    as_in_paper: bool

    @property
    def num_states(self) -> int:
        return STATE_BYTES[self.optimizer] // 4


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
    largest_on_drive: int = 0

    def hold(self, tier: Tier, kind: Kind, nbytes: int, tensors: int = 1) -> None:
        """So many tensors of one size; on a drive each begins on a page."""
        if tier == "nvme" and tensors:
            each = -(-nbytes // (tensors * PAGE)) * PAGE
            nbytes, self.largest_on_drive = tensors * each, max(self.largest_on_drive, each)
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

    job = _Job(stage, world, precision, optimizer, tiers, not isinstance(model_or_n_params, nn.Module))
    most = max((len(list(_operands(job, unit, stores))) for unit in sized), default=1)
    block = block_elements(tiers.window_bytes, most)
    found, traffic = _Sum(), Traffic()
    parts = list(zip(sized, stores.of_units(sizes), strict=True))
    for unit, its in parts:
        _hold(found, job, unit, its)
        if tiers.speculative:
            _hold_shadow(found, job, unit, its)
        if tiers.zenflow is not None:
            _hold_waiting(found, job, unit, its, tiers.zenflow)
        traffic += _traffic(job, unit, its, block)
    found.hold("device", "in_flight", whole.in_flight)
    found.hold("host", "window", _windows(job, parts, block))
    for kind in ("params", "grads"):  # what is read ahead; what is on its way to the drive
        found.hold("host", "in_flight", min(tiers.cache_bytes, found.nbytes["nvme"][kind]))
    return TierPlan(
        stage=stage,
        world=world,
        tiers=tiers,
        nbytes=found.nbytes,
        traffic=traffic,
        largest_on_drive=0 if job.as_in_paper else found.largest_on_drive,
    )


def _own_precision(unit: _Sized, precision: zero.Precision) -> zero.Precision:
    """The same dtypes for a number of parameters, whose own dtype nobody knows."""
    return zero.Precision(
        param=unit.params,
        reduce=precision.reduce_dtype(unit.params),
        accumulate=precision.accumulate_dtype(unit.params),
        master=precision.master_dtype(unit.params),
    )


def _hold(found: _Sum, job: _Job, unit: _Sized, stores: zero.Stores) -> None:
    if not unit.numel:
        return None
    if not unit.params.is_floating_point:
        shard = -(-unit.numel // job.world) if job.stage == 3 else unit.numel
        return found.hold(_tier(stores.params), "params", shard * unit.params.itemsize)
    own = _own_precision(unit, job.precision)
    plan = zero.plan_memory(
        unit.numel, stage=job.stage, world=job.world, precision=own, optimizer=job.optimizer
    )
    # See zero_core.flat_unit, Note [One resting copy]: on the device, a separate master is all that stays.
    near = stores.params is None and stores.optimizer is None
    rests_as_master = near and job.stage == 3 and plan.master and unit.trainable and not job.as_in_paper
    found.hold(_tier(stores.params), "params", 0 if rests_as_master else plan.params)
    if unit.trainable:
        found.hold(_tier(stores.grads), "grads", plan.grads)
        found.hold(_tier(stores.optimizer), "master", plan.master)
        found.hold(_tier(stores.optimizer), "optimizer", plan.optimizer, job.num_states)
    return None


def _hold_shadow(found: _Sum, job: _Job, unit: _Sized, stores: zero.Stores) -> None:
    """What a step writes before it counts, see `shadow`: beside what it will replace, or in host memory."""
    if stores.optimizer is None or not (unit.trainable and unit.numel):
        return
    numel = -(-unit.numel // job.world)
    num_states = job.num_states + (job.precision.master_dtype(unit.params) != unit.params)
    found.hold(_tier(stores.optimizer), "in_flight", 4 * numel * num_states, num_states)
    params = "host" if stores.params is None else _tier(stores.params)
    found.hold(params, "in_flight", numel * unit.params.itemsize)


def _hold_waiting(found: _Sum, job: _Job, unit: _Sized, stores: zero.Stores, policy: ZenFlow) -> None:
    """Sums of gradients and values to come in full size, see `waiting_rows`; chosen rows in compact form."""
    if stores.optimizer is None or not (unit.trainable and unit.numel):
        return
    numel = -(-unit.numel // job.world)
    found.hold("host", "in_flight", numel * (4 + policy.overlap_step * (4 + unit.params.itemsize)))
    found.hold("device", "in_flight", math.ceil(16 * numel * policy.topk_ratio))


@dataclass(frozen=True)
class _Moved:
    """One operand of `StoreStepper`'s kernel: bytes an element read and written, and where they rest."""

    tier: Tier
    read: int
    written: int


def _operands(job: _Job, unit: _Sized, stores: zero.Stores) -> Iterator[_Moved]:
    """Master, gradient, states and (where there is one) the low-precision shard, in the kernel's order."""
    if not (unit.trainable and unit.numel):
        return
    master = job.precision.master_dtype(unit.params)
    separate = master != unit.params
    params = _tier(stores.params)
    yield _Moved(_tier(stores.optimizer) if separate else params, master.itemsize, master.itemsize)
    yield _Moved(_tier(stores.grads), job.precision.accumulate_dtype(unit.params).itemsize, 0)
    for _ in range(job.num_states):
        yield _Moved(_tier(stores.optimizer), 4, 4)
    if separate:
        yield _Moved(params, 0, unit.params.itemsize)


def _traffic(job: _Job, unit: _Sized, stores: zero.Stores, block: int) -> Traffic:
    """With blocks of so many elements."""
    numel, device = -(-unit.numel // job.world) if job.stage else unit.numel, job.tiers.device
    operands = list(_operands(job, unit, stores))
    on_host = device == "cpu" or stores.optimizer is not None
    drive = [each for each in operands if each.tier == "nvme"]
    near = [each for each in operands if each.tier == "device" and device != "cpu" and on_host]
    params = numel * unit.params.itemsize if _tier(stores.params) == "nvme" else 0
    grads = 0
    if _tier(stores.grads) == "nvme" and unit.trainable:
        grads = numel * job.precision.accumulate_dtype(unit.params).itemsize
    return Traffic(
        drive_read=numel * sum(each.read for each in drive),
        drive_written=numel * sum(each.written for each in drive),
        link=numel * sum(each.read + each.written for each in near),
        memory=numel * sum(each.read + each.written for each in operands) * on_host,
        blocks=-(-numel // block) if operands else 0,
        parameters=-(-unit.parameters // job.world) * unit.trainable,
        # Gathered for the forward, and for the backward again.
        params_read=2 * params,
        grads_written=grads,
        grads_read=grads,
    )


def _windows(job: _Job, parts: Sequence[tuple[_Sized, zero.Stores]], block: int) -> int:
    """Memory for blocks of what is neither in host memory nor on a device that the host is."""
    with_state, without = 0, 0  # of units with optimizer state in a store, and with parameters alone
    for unit, stores in parts:
        if stores.optimizer is None and stores.params is None:
            continue
        passing = sum(
            each.tier == "nvme" or (each.tier == "device" and job.tiers.device != "cpu")
            for each in _operands(job, unit, stores)
        )
        if stores.optimizer is None:
            without = max(without, passing)
        else:
            with_state = max(with_state, passing)
    both = job.tiers.zenflow is not None  # a late step and steps beside it, Note [Two windows]
    return DEPTH * (with_state + without if both else max(with_state, without)) * block * 4


def _tier(store: Any) -> Tier:
    """The tier that stands in a store's place."""
    tier: Tier = "device" if store is None else store
    return tier
