"""Schedules that warm up and then stay, fall linearly or fall along a cosine.

In: steps taken (`last_epoch`). Out: rates. The rate after n steps follows DeepSpeed's iteration n - 1, so the
first two steps both use the lowest rate, as there.
"""

from __future__ import annotations

import logging
import math

from torch import Tensor
from torch.optim import Optimizer

from .rates import ClosedForm, Rates, per_group

log = logging.getLogger(__name__)


def warmup_fraction(iteration: int, num_steps: int, kind: str) -> float:
    """How much of the way from the lowest to the highest rate is done.

    Args:
        iteration: Optimizer steps taken, minus one; below 0 counts as 0.
        num_steps: Length of the warm-up; at least 2 for "log".
        kind: "log": `log(iteration + 1) / log(num_steps)`; "linear": `iteration / num_steps`.

    Returns:
        0 to 1.
    """
    num_steps = max(2, num_steps)
    if iteration >= num_steps:
        return 1.0
    done = max(iteration, 0)
    return math.log(done + 1) / math.log(num_steps) if kind == "log" else done / num_steps


class WarmupLR(ClosedForm):
    """Warm up from the lowest to the highest rate, then stay: `lr = min + (max - min) * warmup_fraction`.

    Args:
        optimizer: Its groups' rates are set.
        warmup_min_lr: Lowest rate, one or one a group.
        warmup_max_lr: Highest rate, one or one a group; None means the optimizer's own.
        warmup_num_steps: Steps of the warm-up.
        warmup_type: "log" or "linear".
        last_epoch: Steps taken before; -1 for a new run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        if warmup_max_lr is None:
            warmup_max_lr = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self.min_lrs = per_group(warmup_min_lr, optimizer, "warmup_min_lr")
        self.max_lrs = per_group(warmup_max_lr, optimizer, "warmup_max_lr")
        self.warmup_num_steps = max(2, warmup_num_steps)
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group after `last_epoch` steps."""
        scale = self._scale(self.last_epoch - 1)
        return [low + (high - low) * scale for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _scale(self, iteration: int) -> float:
        return warmup_fraction(iteration, self.warmup_num_steps, self.warmup_type)


class WarmupDecayLR(WarmupLR):
    """Warm up, then fall linearly back to the lowest rate at `total_num_steps`.

    Args:
        optimizer: Its groups' rates are set.
        total_num_steps: Step at which the rate is back at its lowest.
        warmup_min_lr: Lowest rate, one or one a group.
        warmup_max_lr: Highest rate, one or one a group; None means the optimizer's own.
        warmup_num_steps: Steps of the warm-up.
        warmup_type: "log" or "linear".
        last_epoch: Steps taken before; -1 for a new run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = 1e-3,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        if total_num_steps < warmup_num_steps:
            log.warning(
                "WarmupDecayLR: total_num_steps %d < warmup_num_steps %d", total_num_steps, warmup_num_steps
            )
        self.total_num_steps = total_num_steps
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_epoch)

    def _scale(self, iteration: int) -> float:
        if iteration < self.warmup_num_steps:
            return super()._scale(iteration)
        left = self.total_num_steps - iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(ClosedForm):
    """Warm up to the optimizer's own rate, then fall along half a cosine.

    `lr = optimizer's rate * ratio`; in the warm-up `ratio = warmup_min_ratio + (1 - warmup_min_ratio) *
    warmup_fraction` (0 for the very first step, as in DeepSpeed); then, for the k-th step after it,
    `ratio = cos_min_ratio + (1 - cos_min_ratio) * (1 + cos(pi * k / falling)) / 2`, with
    `falling = total_num_steps - warmup_num_steps`.

    Args:
        optimizer: Its groups' rates are set.
        total_num_steps: Step at which `cos_min_ratio` is reached; it is kept from there.
        warmup_min_ratio: Lowest ratio of the warm-up.
        warmup_num_steps: Steps of the warm-up.
        cos_min_ratio: Last ratio.
        warmup_type: "log" or "linear".
        last_epoch: Steps taken before; -1 for a new run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 1e-4,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        self.total_num_steps = total_num_steps
        self.warmup_min_ratio = warmup_min_ratio
        self.warmup_num_steps = max(2, warmup_num_steps)
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = warmup_type
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group after `last_epoch` steps."""
        ratio = self._ratio(self.last_epoch - 1)
        return [float(lr) * ratio for lr in self.base_lrs]

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            done = warmup_fraction(iteration, self.warmup_num_steps, self.warmup_type)
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * done
        falling = max(1, self.total_num_steps - self.warmup_num_steps)
        k = min(iteration - self.warmup_num_steps + 1, falling)
        return self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * k / falling)) / 2.0
