"""Adagrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Adagrad
from zero_core.steppers import RULES

from .optimizer import HostOptimizer
from .rules import ADAGRAD


class CPUAdagrad(HostOptimizer):
    """Adagrad on the host: a drop-in for `torch.optim.Adagrad` with dense gradients, with parameters anywhere.

    In fp32 the state dict is torch's own, in both directions. A step from equal states (without weight decay) ends
    within 3 units in the last place of `torch.optim.Adagrad(fused=True)` for `sum`, and within 8 for parameters, in
    units of the larger of the parameter and its update. Host memory, bytes an element: 4 for fp32 parameters on
    the CPU, 8 for others.

    Args:
        params: parameters or groups: fp32, bf16 or fp16, on the CPU or on CUDA devices.
        lr: learning rate, a number or a tensor of one element.
        lr_decay: the rate at step t is `lr / (1 + (t - 1) * lr_decay)`.
        weight_decay: added to the gradient as `weight_decay * param`.
        initial_accumulator_value: what the sums of squares begin with.
        eps: added to the root of the sum.
        foreach, fused: kept for torch, where they choose between ways of one result; here there is one.
        maximize, differentiable: must be False.

    Raises:
        OffloadConfigError: a value or an option that cannot be honoured, a parameter of another dtype.

    Source: Duchi, Hazan & Singer, JMLR 12 (2011), figure 1.
    """

    rule = ADAGRAD
    fused_rule = RULES[Adagrad]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "eps": eps, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "foreach": foreach, "maximize": maximize,
            "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)
