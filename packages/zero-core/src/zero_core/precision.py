"""Loss scaling, and the verdict that all ranks share on whether a step overflowed.

In: gradient shards of scaled losses. Out: the factor that unscales them, and whether to skip the step, with a report
that names the parameter. Next: `norms` clips, `optimizer` steps.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from .collectives import Wire
from .errors import ZeroConfigError
from .hooks import Lane

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OverflowReport:
    """Where a step's first non-finite gradient was found: the lowest rank that has one, and its first parameter.

    Attributes:
        history: the largest |gradient| (times the loss scale) in that parameter's unit, on any rank, in the last steps
            that were finite, oldest first; empty without a scaler.
        skipped: the step changed nothing, since a scaler adapts.
    """

    step: int
    rank: int
    parameter: str
    module: str
    loss_scale: float
    history: tuple[float, ...] = ()
    skipped: bool = True

    def __str__(self) -> str:
        before = ", ".join(f"{peak:.3g}" for peak in self.history)
        return (
            f"step {self.step}: non-finite gradient of '{self.parameter}' (module '{self.module}') in the shard of "
            f"rank {self.rank} at loss scale {self.loss_scale:g}"
            + (f"; largest |gradient| of its unit in the steps before: {before}" if before else "")
            + (
                "; step skipped"
                if self.skipped
                else "; without a loss scaler the step goes on, with that gradient"
            )
        )


class PeakHistory:
    """The largest |gradient| of each unit in this rank's shards, in the last finite steps."""

    def __init__(self, length: int) -> None:
        self._rows: deque[dict[int, torch.Tensor]] = deque(maxlen=length)

    @torch.no_grad()
    def record(self, lanes: Sequence[Lane]) -> None:
        """Take a step's gradients in: one read of them."""
        if self._rows.maxlen:
            values = {lane.unit.index: lane.shard.value for lane in lanes}
            self._rows.append(
                {
                    unit: torch.linalg.vector_norm(value, torch.inf)
                    for unit, value in values.items()
                    if value is not None and value.numel()
                }
            )

    def of(self, unit: int, wire: Wire) -> tuple[float, ...]:
        """Those of one unit over all ranks; every rank calls it."""
        mine = [row.get(unit, torch.zeros(())).to(wire.device, torch.float64) for row in self._rows]
        if not mine:
            return ()
        peaks = torch.stack(mine)
        wire.all_reduce("history of gradients", peaks, dist.ReduceOp.MAX).wait()
        return tuple(peaks.tolist())


class LossScaler:
    """Multiplies the loss so that small fp16 gradients survive, and adapts the factor.

    Args:
        init_scale: the factor at the start.
        dynamic: False keeps `init_scale` for ever (a non-finite gradient still skips the step).
        growth_interval: finite steps in a row after which the scale grows.
        growth_factor, backoff_factor: what it is multiplied by when it grows, or backs off.
        hysteresis: overflows that are tolerated (skipped) before the scale backs off.
        consecutive_hysteresis: a finite step restores the tolerance; otherwise only growth does.
        min_scale: a dynamic scale never goes below.
        at_minimum: what happens when gradients overflow there. "raise": `OverflowError`, since training stands still;
            "skip": a warning, and the step is skipped; or a function that is called on every rank with the
            `OverflowReport`, to save a checkpoint say, before the error is raised.
        history: steps whose largest gradients the report shows; each costs a read of the gradient shards. 0: none.

    Raises:
        ZeroConfigError: a factor or interval out of range.

    Source: Micikevicius et al., Mixed Precision Training (2018), section 3.2.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        dynamic: bool = True,
        growth_interval: int = 2000,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = False,
        min_scale: float = 1.0,
        at_minimum: Literal["raise", "skip"] | Callable[[OverflowReport], object] = "raise",
        history: int = 8,
    ) -> None:
        checks = {
            "init_scale > 0": math.isfinite(init_scale) and init_scale > 0,
            "growth_interval >= 1": growth_interval >= 1,
            "growth_factor > 1": growth_factor > 1,
            "0 < backoff_factor < 1": 0 < backoff_factor < 1,
            "hysteresis >= 1": hysteresis >= 1,
            "0 < min_scale <= init_scale": not dynamic or 0 < min_scale <= init_scale,
            "at_minimum 'raise', 'skip' or a function": at_minimum in ("raise", "skip")
            or callable(at_minimum),
            "history >= 0": history >= 0,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ZeroConfigError(f"LossScaler: expected {' and '.join(broken)}")
        self.value = float(init_scale)
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.hysteresis = hysteresis
        self.consecutive_hysteresis = consecutive_hysteresis
        self.min_scale = min_scale
        self.at_minimum = at_minimum
        self.history = history
        self._finite_steps = 0
        self._tolerance = hysteresis
        self._owner: weakref.ref[object] | None = None

    def bind(self, optimizer: object) -> None:
        """Belong to one optimizer, whose steps adapt the scale.

        Raises:
            ZeroConfigError: it belongs to another one, whose step would change the scale under this one's gradients.
        """
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not optimizer:
            raise ZeroConfigError(
                "LossScaler: it belongs to another optimizer; give each optimizer one of its own"
            )
        self._owner = weakref.ref(optimizer)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward` on."""
        return loss * self.value

    def update(self, report: OverflowReport | None) -> None:
        """Adapt to one step's outcome; the optimizer calls it, with what all ranks agreed on.

        Raises:
            OverflowError: gradients overflow at the smallest scale, and `at_minimum` does not say "skip".
        """
        if not self.dynamic:
            return
        if report is not None:
            self._finite_steps = 0
            if self._tolerance > 1:
                self._tolerance -= 1
            elif self.value <= self.min_scale:
                self._stand_still(report)
            else:
                self.value = max(self.value * self.backoff_factor, self.min_scale)
            return
        self._finite_steps += 1
        if self.consecutive_hysteresis:
            self._tolerance = self.hysteresis
        if self._finite_steps % self.growth_interval == 0:
            self.value *= self.growth_factor
            self._tolerance = self.hysteresis

    def _stand_still(self, report: OverflowReport) -> None:
        message = f"LossScaler: gradients overflow at the smallest scale, {self.min_scale:g}; {report}"
        if self.at_minimum == "skip":
            logger.warning("%s", message)
            return
        if callable(self.at_minimum):
            self.at_minimum(report)
        raise OverflowError(
            f"{message}. Training cannot go on: look for a non-finite loss, or lower min_scale"
        )

    def state_dict(self) -> dict[str, Any]:
        """What changes while training."""
        return {"value": self.value, "finite_steps": self._finite_steps, "tolerance": self._tolerance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.value = float(state["value"])
        self._finite_steps = int(state["finite_steps"])
        self._tolerance = int(state["tolerance"])


def locate_overflow(
    lanes: Sequence[Lane], wire: Wire, step: int, scaler: LossScaler | None, peaks: PeakHistory
) -> OverflowReport:
    """Agree on the first non-finite gradient; every rank calls it once a step is known to have overflowed."""
    loss_scale = 1.0 if scaler is None else scaler.value
    position, names = _first_non_finite(lanes)
    nowhere = torch.iinfo(torch.int64).max
    # Rank and parameter in one integer, so that one MIN over ranks finds both.
    key = nowhere if position is None else wire.group.rank() * len(names) + position
    agreed = torch.tensor([key], dtype=torch.int64, device=wire.device)
    wire.all_reduce("overflow report", agreed, dist.ReduceOp.MIN).wait()
    found = int(agreed)
    if found == nowhere:  # finite gradients whose norm is not
        return OverflowReport(step, -1, "(the norm itself)", "(root)", loss_scale, skipped=scaler is not None)
    rank, position = divmod(found, len(names))
    unit = next(lane.unit for lane in lanes if names[position] in (s.name for s in lane.unit.layout.slots))
    module = names[position].rpartition(".")[0] or "(root)"
    history = peaks.of(unit.index, wire)
    return OverflowReport(step, rank, names[position], module, loss_scale, history, scaler is not None)


def _first_non_finite(lanes: Sequence[Lane]) -> tuple[int | None, list[str]]:
    names = [slot.name for lane in lanes for slot in lane.unit.layout.slots]
    base = 0
    for lane in lanes:
        value = lane.shard.value
        for part in lane.unit.local_slots if value is not None else ():
            assert value is not None
            if not torch.isfinite(value[part.start : part.stop]).all():
                return base + part.index, names
        base += len(lane.unit.layout.slots)
    return None, names
