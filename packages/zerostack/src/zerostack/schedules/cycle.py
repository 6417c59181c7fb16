"""Schedules that go up to find or use a high rate: the range test and the one-cycle policy.

In: steps taken (`last_epoch`). Out: rates, and the momentum for `OneCycle`.
"""

from __future__ import annotations

import logging
import math

from torch import Tensor
from torch.optim import Optimizer

from .rates import ClosedForm, Rates, per_group

log = logging.getLogger(__name__)

_HIGHEST_MOMENTUM = 0.999


class LRRangeTest(ClosedForm):
    """Raise the rate steadily to find the largest one that trains.

    `lr(n) = min_lr * (1 + step_rate * n / step_size)`, with the fraction rounded down when `staircase`.

    Args:
        optimizer: Its groups' rates are set.
        lr_range_test_min_lr: First rate, one or one a group.
        lr_range_test_step_size: Steps in which the rate grows by `min_lr * step_rate`.
        lr_range_test_step_rate: See above.
        lr_range_test_staircase: Change the rate only once in `step_size` steps.
        last_epoch: Steps taken before; -1 for a new run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: Rates = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.min_lrs = per_group(lr_range_test_min_lr, optimizer, "lr_range_test_min_lr")
        self.step_size = lr_range_test_step_size
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group after `last_epoch` steps."""
        intervals = self.last_epoch / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [lr * (1.0 + self.step_rate * intervals) for lr in self.min_lrs]


class OneCycle(ClosedForm):
    """One rise and fall of the rate, then decay; the momentum runs the other way.

    In the cycle, `lr(n) = min_lr + (max_lr - min_lr) * s` and `momentum = max_mom - (max_mom - min_mom) * s`,
    with `s` rising from 0 to 1 in `first_step_size` steps and falling in `second_step_size`; `stair_count`
    rounds `s` down to that many stairs. Then, with d = decay steps / `decay_step_size`:
    `lr = min_lr / (1 + decay_lr_rate * d)` and `momentum = max_mom * (1 + decay_mom_rate * d)`, kept below 1.
    Unlike DeepSpeed, the second beta of Adam is left as it was given, the first step has the momentum of the
    formula, and SGD's momentum takes part too.

    Args:
        optimizer: Its groups' rates, and `betas[0]` or `momentum`, are set.
        cycle_min_lr: Rate at both ends of the cycle, one or one a group.
        cycle_max_lr: Rate at the top, one or one a group.
        decay_lr_rate: See above.
        cycle_first_step_size: Steps from bottom to top.
        cycle_second_step_size: Steps from top to bottom; None means as many.
        cycle_first_stair_count: Stairs on the way up; 0 is smooth.
        cycle_second_stair_count: Stairs on the way down; None means as many.
        decay_step_size: Steps in one decay interval; 0 keeps the last values.
        cycle_momentum: Whether the momentum takes part.
        cycle_min_mom: Momentum at the top of the cycle.
        cycle_max_mom: Momentum at both ends.
        decay_mom_rate: See above.
        last_epoch: Steps taken before; -1 for a new run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: Rates,
        cycle_max_lr: Rates,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.min_lrs = per_group(cycle_min_lr, optimizer, "cycle_min_lr")
        self.max_lrs = per_group(cycle_max_lr, optimizer, "cycle_max_lr")
        first, second = cycle_first_step_size, cycle_second_step_size
        self.step_sizes = (first, first if second is None else second)
        up, down = cycle_first_stair_count, cycle_second_stair_count
        self.stair_counts = (up, up if down is None else down)
        self.decay_step_size = decay_step_size
        self.decay_rates = (decay_lr_rate, decay_mom_rate)
        self.momentum_range = (cycle_min_mom, cycle_max_mom)
        self.momentum_key = _momentum_key(optimizer) if cycle_momentum else None
        if cycle_momentum and self.momentum_key is None:
            log.warning("OneCycle: %s has no momentum; only the rate is cycled", type(optimizer).__name__)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group after `last_epoch` steps; the momentum is set on the way."""
        scale, decay = self._scale(), self._decay()
        self._set_momentum(scale, decay)
        fall = 1.0 + self.decay_rates[0] * decay
        return [
            (low + (high - low) * scale) / fall for low, high in zip(self.min_lrs, self.max_lrs, strict=True)
        ]

    def _scale(self) -> float:
        first, second = self.step_sizes
        if self.last_epoch >= first + second:
            return 0.0
        rising = self.last_epoch <= first
        scale = self.last_epoch / first if rising else (first + second - self.last_epoch) / second
        stairs = self.stair_counts[0 if rising else 1]
        return math.floor(scale * stairs) / stairs if stairs else scale

    def _decay(self) -> float:
        steps = self.last_epoch - sum(self.step_sizes)
        return max(0, steps) / self.decay_step_size if self.decay_step_size else 0.0

    def _set_momentum(self, scale: float, decay: float) -> None:
        if self.momentum_key is None:
            return
        low, high = self.momentum_range
        momentum = (high - (high - low) * scale) * (1.0 + self.decay_rates[1] * decay)
        momentum = min(momentum, _HIGHEST_MOMENTUM)
        for group in self.optimizer.param_groups:
            if self.momentum_key == "betas":
                group["betas"] = (momentum, *group["betas"][1:])
            else:
                group["momentum"] = momentum


def _momentum_key(optimizer: Optimizer) -> str | None:
    """The name under which every group of the optimizer keeps its momentum."""
    groups = optimizer.param_groups
    if all("betas" in group for group in groups):
        return "betas"
    return "momentum" if all(group.get("momentum") for group in groups) else None
