"""PURE: how long a step will take, from what it moves and how fast that goes here.

In: a `TierPlan`, `Speeds`. Out: a `Forecast`. Ranks of one machine share its memory, its drives and its link.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import OffloadConfigError
from .tiers import TierPlan

if TYPE_CHECKING:
    from accel_kernels import TransferSettings

PARAMETER_S = 80e-6
"""What Python spends on a parameter in a step; matters for models whose step takes a few milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of one machine, in GB/s (1e9 bytes), all its ranks together.

    Attributes:
        memory: host memory under the kernel of an optimizer, bytes read and written counted alike.
        drive_read, drive_write: each alone. None: not measured.
        drive_both: while it reads and writes, bytes counted alike. None: as if one came after the other.
        link: between host and device, one direction.
        settings: that the drive was read and written with, the fastest found there (of several drives the slowest's).
            `NvmeStore(path, engine=accel_kernels.TransferEngine(**settings.arguments()))` uses them.
    """

    memory: float
    drive_read: float | None = None
    drive_write: float | None = None
    drive_both: float | None = None
    link: float | None = None
    settings: TransferSettings | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "settings" and value is not None and not value > 0:
                raise OffloadConfigError(f"Speeds({name}=...): expected GB/s above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds.

    Attributes:
        drive_s, memory_s, link_s: of an optimizer step, each as if it were alone.
        optimizer_s: `OffloadedOptimizer.step`: the longest of them, and what of the rest its first and last block leave
            uncovered. Without the clipping of gradients, which reads them once more.
        backward_io_s: what the drive works beside one forward and backward.
        step_s: forwards, backwards and the optimizer's step; None: `compute_s` is not known.
    """

    drive_s: float
    memory_s: float
    link_s: float
    optimizer_s: float
    backward_io_s: float
    step_s: float | None


def forecast(
    plan: TierPlan,
    speeds: Speeds,
    *,
    ranks: int,
    accumulate: int = 1,
    compute_s: float | None = None,
) -> Forecast:
    """Seconds of a step.

    Args:
        plan: of one rank.
        speeds: of its machine.
        ranks: that share it.
        accumulate: backwards before each step.
        compute_s: of one forward and backward where nothing waits for a store.

    Raises:
        OffloadConfigError: a speed that the plan needs is not there, or a number is out of range.
    """
    if ranks < 1 or accumulate < 1 or (compute_s is not None and compute_s < 0):
        raise OffloadConfigError(
            f"forecast: expected ranks and accumulate of 1 or more, compute_s of 0 or more, got {ranks}, {accumulate}, "
            f"{compute_s}"
        )
    moved = plan.traffic
    drive_s = drive_seconds(moved.drive_read, moved.drive_written, speeds, ranks)
    memory_s = _seconds(moved.memory, speeds.memory, ranks)
    link_s = _seconds(moved.link, speeds.link, ranks)
    longest, rest = _longest(drive_s, memory_s, link_s)
    optimizer_s = longest + rest / max(moved.blocks, 1) + moved.parameters * PARAMETER_S
    first_s = drive_seconds(moved.params_read, moved.grads_written, speeds, ranks)
    later_s = drive_seconds(moved.params_read + moved.grads_read, moved.grads_written, speeds, ranks)
    step_s = None
    if compute_s is not None:
        # What is prefetched and written beside the maths costs nothing until it takes longer than that.
        step_s = max(compute_s, first_s) + (accumulate - 1) * max(compute_s, later_s) + optimizer_s
    return Forecast(
        drive_s=drive_s,
        memory_s=memory_s,
        link_s=link_s,
        optimizer_s=optimizer_s,
        backward_io_s=first_s,
        step_s=step_s,
    )


def _longest(*seconds: float) -> tuple[float, float]:
    """The longest, and the sum of the others."""
    return max(seconds), sum(seconds) - max(seconds)


def drive_seconds(read: int, written: int, speeds: Speeds, ranks: int) -> float:
    """Of bytes read and written beside each other, as far as there are as many of the one as of the other."""
    beside = 0 if speeds.drive_both is None else min(read, written)
    return (
        _seconds(2 * beside, speeds.drive_both, ranks)
        + _seconds(read - beside, speeds.drive_read, ranks)
        + _seconds(written - beside, speeds.drive_write, ranks)
    )


def _seconds(nbytes: int, speed: float | None, ranks: int) -> float:
    if not nbytes:
        return 0.0
    if speed is None:
        raise OffloadConfigError(f"forecast: {nbytes} bytes are to be moved at a speed that was not measured")
    return nbytes * ranks / (speed * 1e9)
