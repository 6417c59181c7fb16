"""`preflight`: what a run will take and how long its steps will be, before anything of it is allocated.

In: a model or a number of parameters, and where things are to rest. Out: a `Preflight`, which prints as a table and
refuses what does not fit. `tier_plan` and `forecast` do the arithmetic, `free_bytes` and `speeds` ask the machine.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from zero_core import Precision
from zero_core.units import UnitChoice

from .errors import OffloadConfigError, OffloadDiskError, OffloadMemoryError
from .forecast import Forecast, Speeds, forecast
from .free_bytes import Free, existing, free_bytes
from .speeds import BYTES_STEPPED, measure_speeds
from .tier_plan import plan_tiers
from .tiers import KINDS, TIERS, Tier, TierPlan, Tiers
from .zenflow import ZenFlow

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A plan, and what this machine has for it.

    Attributes:
        plan: bytes of one rank, by tier and kind, and the traffic of a step.
        ranks: of this machine; they share its memory and its drives.
        free: bytes, before the run.
        speeds: measured or given; None: neither.
        forecast: seconds of a step; None without speeds.
        paths: folders of the `NvmeStore`.
    """

    plan: TierPlan
    ranks: int
    free: Free
    speeds: Speeds | None = None
    forecast: Forecast | None = None
    paths: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            OffloadMemoryError: device or host memory, or the address space of a process, is too small.
            OffloadDiskError: the drives are.
        """
        plan, ranks, free = self.plan, self.ranks, self.free
        if plan.tiers.device != "cpu":
            self._fits(
                "device memory", plan.total("device"), free.device, 1, "more ranks, or move more to the host"
            )
        self._fits(
            "host memory", plan.host_bytes, free.host, ranks, "move more to nvme, or use more machines"
        )
        # The states on a drive are mapped, see Note [Views of a drive].
        mapped = plan.host_bytes + plan.total("nvme")
        self._fits("address space", mapped, free.address_space, 1, "raise `ulimit -v`, or use more ranks")
        needed = plan.total("nvme") * ranks
        # A tensor lies on one drive: of each but one, less than the largest may be left that nothing fits into.
        split = (free.num_drives - 1) * plan.largest_on_drive
        if free.drive is not None and needed and needed + split > free.drive:
            pieces = f" in pieces of up to {plan.largest_on_drive}" if split else ""
            raise OffloadDiskError(
                errno.ENOSPC,
                f"preflight: {', '.join(self.paths)}: {ranks} rank(s) need {needed} bytes{pieces} on the drive, and "
                f"{free.drive} are free; make room, or name another drive",
            )

    def _fits(self, what: str, nbytes: int, free: int | None, ranks: int, cure: str) -> None:
        if free is not None and nbytes * ranks > free:
            raise OffloadMemoryError(
                f"preflight: {what}: {ranks} rank(s) need {nbytes * ranks} bytes, and {free} are free; {cure}"
            )

    def __str__(self) -> str:
        plan, used = self.plan, [kind for kind in KINDS if any(self.plan.nbytes[t][kind] for t in TIERS)]
        here = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        rows = [["per rank", *(kind.replace("_", " ") for kind in used), "total", here, "free"]]
        for tier in TIERS:
            total = plan.total(tier)
            together = plan.host_bytes if tier == "host" else total
            free = {"device": self.free.device, "host": self.free.host, "nvme": self.free.drive}[tier]
            same = tier == "device" and plan.tiers.device == "cpu"
            rows.append(
                [
                    tier,
                    *(readable(plan.nbytes[tier][kind]) for kind in used),
                    readable(total),
                    "in host's" if same else readable(together * (1 if tier == "device" else self.ranks)),
                    "" if same else "?" if free is None else readable(free),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join([*lines, *self._seconds()])

    def _seconds(self) -> list[str]:
        if self.speeds is None or self.forecast is None:
            return ["speeds: not measured"]
        found, speeds = self.forecast, self.speeds
        named = {
            "memory": speeds.memory,
            "drive reads": speeds.drive_read,
            "drive writes": speeds.drive_write,
            "both at once": speeds.drive_both,
            "link": speeds.link,
        }
        lines = ["speeds: " + ", ".join(f"{n} {v:.3g} GB/s" for n, v in named.items() if v is not None)]
        if speeds.settings is not None:
            best = speeds.settings
            block = f"blocks of {best.block_bytes >> 10} KiB"
            lines.append(f"drive at its best with {best.engine}, {block}, depth {best.queue_depth}")
        lines.append(
            f"optimizer step: {found.optimizer_s:.3g} s (drive {found.drive_s:.3g}, memory {found.memory_s:.3g}, "
            f"link {found.link_s:.3g})"
        )
        if found.backward_io_s:
            lines.append(f"drive beside each forward and backward: {found.backward_io_s:.3g} s")
        if found.step_s is not None:
            lines.append(f"whole step: {found.step_s:.3g} s")
        return lines


def preflight(
    model_or_n_params: nn.Module | int | float,
    *,
    stage: int,
    world: int,
    path: Paths | None = None,
    params: Tier = "device",
    grads: Tier = "device",
    optimizer: Tier = "device",
    optimizer_ratio: float = 1.0,
    keep_first: bool = False,
    speculative: bool = False,
    zenflow: ZenFlow | None = None,
    optimizer_kind: str = "adamw",
    precision: Precision | None = None,
    units: UnitChoice = None,
    window_bytes: int = 192 << 20,
    cache_bytes: int = 256 << 20,
    device: str | None = None,
    ranks: int | None = None,
    accumulate: int = 1,
    compute_s: float | None = None,
    measure: bool = True,
    speeds: Speeds | None = None,
    free: Free | None = None,
    strict: bool = False,
) -> Preflight:
    """Plan a run: bytes by tier, what is free, and seconds of a step; nothing of the run is allocated.

    One process calls it for all ranks of its machine, while they are idle: before they start, or at rank 0.

    Args:
        model_or_n_params: a model (the meta device will do), or a number of parameters; see `plan_tiers`.
        stage: as for `zero_core.shard`.
        world: number of ranks, on all machines.
        path: folder or folders of the `NvmeStore`.
        params: where they rest, "device", "host" or "nvme"; as `zero_core.Stores` says it with stores.
        grads: likewise.
        optimizer: likewise.
        optimizer_ratio: as `zero_core.Stores`.
        keep_first: likewise.
        speculative: as `Tiers`; bytes alone, the seconds are those of a step that begins after backward.
        zenflow: likewise.
        optimizer_kind: as `zero_core.plan_memory`'s `optimizer`.
        precision: as for `zero_core.shard`.
        units: as for `zero_core.shard`.
        window_bytes: as for `OffloadedOptimizer`.
        cache_bytes: as for `NvmeStore`.
        device: type of the device that computes; None: the accelerator, if there is one, else "cpu".
        ranks: of this machine; None: all.
        accumulate: backwards before each step.
        compute_s: seconds of one forward and backward where nothing rests in a store, measured by the caller.
        measure: find speeds now: a second for memory, three for each drive.
        speeds: known ones, instead of measured ones.
        free: likewise.
        strict: `check` before anything is measured.

    Returns:
        What was found; `print` it, `check` it.

    Raises:
        OffloadConfigError, zero_core.ZeroConfigError: an argument that cannot be honoured.
        OffloadMemoryError, OffloadDiskError: with `strict`, see `Preflight.check`; a folder that cannot be measured.
    """
    ranks = world if ranks is None else ranks
    if not 1 <= ranks <= world:
        raise OffloadConfigError(f"ranks: expected 1 to {world} of this machine, got {ranks!r}")
    paths = [] if path is None else [path] if isinstance(path, str | os.PathLike) else list(path)
    folders = tuple(os.fspath(each) for each in paths)
    if "nvme" in (params, grads, optimizer) and not folders and measure and speeds is None:
        raise OffloadConfigError(
            "path: expected the folder of an NvmeStore, got None; give one, or measure=False"
        )
    for folder in folders:
        if not os.path.isdir(existing(folder)):
            raise OffloadDiskError(errno.ENOTDIR, f"preflight: {folder}: {existing(folder)} is not a folder")
    tiers = Tiers(
        params=params,
        grads=grads,
        optimizer=optimizer,
        optimizer_ratio=optimizer_ratio,
        keep_first=keep_first,
        speculative=speculative,
        zenflow=zenflow,
        device=device or _device(),
        window_bytes=window_bytes,
        cache_bytes=cache_bytes,
    )
    plan = plan_tiers(
        model_or_n_params,
        stage=stage,
        world=world,
        tiers=tiers,
        precision=precision,
        optimizer=optimizer_kind,
        units=units,
    )
    free = free or free_bytes(folders, tiers.device)
    found = Preflight(plan=plan, ranks=ranks, free=free, paths=folders)
    if strict:
        found.check()
    if speeds is None and measure:
        speeds = measure_speeds(
            folders if plan.total("nvme") else (),
            ranks=ranks,
            device=tiers.device,
            numel=plan.traffic.memory // BYTES_STEPPED * ranks,
            traffic=plan.traffic,
        )
    if speeds is None:
        return found
    seconds = forecast(plan, speeds, ranks=ranks, accumulate=accumulate, compute_s=compute_s)
    return Preflight(plan=plan, ranks=ranks, free=free, speeds=speeds, forecast=seconds, paths=folders)


def readable(nbytes: float) -> str:
    """Bytes in decimal units, as drives are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.4g} PB"


def _device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
