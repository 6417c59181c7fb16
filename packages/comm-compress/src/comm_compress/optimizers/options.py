"""PURE: the hyperparameters that the optimizers of this package share, checked before anything is built on them."""

from __future__ import annotations

from typing import Any

from ..errors import CompressConfigError


def adam_defaults(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    *,
    bias_correction: bool,
    decoupled_weight_decay: bool,
) -> dict[str, Any]:
    """Defaults of parameter groups.

    Raises:
        CompressConfigError: out of range.
    """
    checks = {
        f"lr >= 0, got {lr!r}": float(lr) >= 0,
        f"0 <= beta < 1 for both betas, got {betas!r}": len(betas) == 2
        and all(0 <= beta < 1 for beta in betas),
        f"eps > 0, got {eps!r}": eps > 0,
        f"weight_decay >= 0, got {weight_decay!r}": weight_decay >= 0,
    }
    broken = [rule for rule, holds in checks.items() if not holds]
    if broken:
        raise CompressConfigError(f"expected {'; '.join(broken)}")
    return {
        "lr": lr,
        "betas": tuple(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "bias_correction": bias_correction,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
