"""What all schedules share: rates given once or once a parameter group, and a state that is the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Rates = float | Sequence[float]


def per_group(value: Rates, optimizer: Optimizer, name: str) -> list[float]:
    """One value for each parameter group."""
    groups = len(optimizer.param_groups)
    if isinstance(value, int | float):
        return [float(value)] * groups
    if len(value) != groups:
        raise ValueError(f"{name}: expected one rate or {groups} (one a parameter group), got {len(value)}")
    return [float(item) for item in value]


class ClosedForm(LRScheduler):
    """A schedule that is a formula of the step: its state is the position, its shape stays the configuration's."""

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, with this schedule's own rates and lengths."""
        self.last_epoch = int(state_dict["last_epoch"])
        self._step_count = self.last_epoch + 1
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
