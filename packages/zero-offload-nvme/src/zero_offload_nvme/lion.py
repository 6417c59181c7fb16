"""Lion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from zero_core import steppers

from .optimizer import HostOptimizer
from .rules import LION


class CPULion(HostOptimizer):
    """Lion on the host, with decoupled weight decay; torch has none.

    Host memory, bytes an element: 4 for fp32 parameters on the CPU, 8 for others.

    Args:
        params: parameters or groups: fp32, bf16 or fp16, on the CPU or on CUDA devices.
        lr: learning rate, a number or a tensor of one element.
        betas: factors of the update's and of the stored average.
        weight_decay: `lr * weight_decay * param` is taken off the parameter.

    Raises:
        OffloadConfigError: a value that cannot be honoured, a parameter of another dtype.

    Source: Chen et al., arXiv:2302.06675, program 1.
    """

    rule = LION
    fused_rule = steppers.LION

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
