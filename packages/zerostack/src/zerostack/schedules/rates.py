"""A rate that is given once or once a parameter group."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

Rates = float | Sequence[float]


def per_group(value: Rates, optimizer: Optimizer, name: str) -> list[float]:
    """One value for each parameter group."""
    groups = len(optimizer.param_groups)
    if isinstance(value, int | float):
        return [float(value)] * groups
    if len(value) != groups:
        raise ValueError(f"{name}: expected one rate or {groups} (one a parameter group), got {len(value)}")
    return [float(item) for item in value]
