"""Lion as a plain torch optimizer: torch has none, `accel_kernels.lion_step` does the update.

In: fp32 parameters (or shards of them) with gradients. Out: updated parameters; one fp32 state, `exp_avg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import accel_kernels as ak
import torch
from torch.optim import Optimizer
from zero_core import steppers


class Lion(Optimizer):
    """Evolved sign momentum with decoupled weight decay.

    Args:
        params: fp32 parameters or parameter groups.
        lr: Learning rate.
        betas: Factors of the update's and of the stored average.
        weight_decay: Factor of the decoupled decay.

    Source: Chen et al., arXiv:2302.06675, program 1.
    """

    fused_rule = steppers.LION

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None or not param.numel():
                    continue
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
                segment = ak.LionSegment(
                    start=0,
                    stop=param.numel(),
                    lr=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                )
                grad = param.grad.contiguous().view(-1)
                ak.lion_step(param.view(-1), grad, state["exp_avg"].view(-1), [segment])
        return loss
