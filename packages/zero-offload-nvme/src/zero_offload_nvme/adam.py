"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Adam
from zero_core.steppers import RULES

from .optimizer import HostOptimizer
from .rules import ADAM


class CPUAdam(HostOptimizer):
    """Adam on the host: a drop-in for `torch.optim.Adam`, with parameters anywhere.

    In fp32 the state dict is torch's own, in both directions. A step from equal states (without L2) ends within 3 units
    in the last place of `torch.optim.Adam(fused=True)` for `exp_avg_sq` and `exp_avg`, and within 16 for parameters,
    each in units of the larger of the two terms that are added up: torch's fused arithmetic rounds elsewhere. Some 90 %
    of the parameters have the same bits. Those of accel-kernels and of zero-core's fused step they have in any case.

    Host memory, bytes an element: 8 for fp32 parameters on the CPU; 12 for bf16, fp16 and for parameters on a device,
    which have an fp32 master here (and two buffers of 8 M elements a direction).

    Args:
        params: parameters or groups: fp32, bf16 or fp16, on the CPU or on CUDA devices.
        lr: learning rate, a number or a tensor of one element.
        betas: factors of the two averages.
        eps: added to the root of the second moment.
        weight_decay: added to the gradient as `weight_decay * param`; see `decoupled_weight_decay`.
        foreach, fused: kept for torch, where they choose between ways of one result; here there is one.
        amsgrad, maximize, capturable, differentiable: must be False.
        decoupled_weight_decay: take `lr * weight_decay * param` off the parameter instead (AdamW).

    Raises:
        OffloadConfigError: a value or an option that cannot be honoured, a parameter of another dtype.

    Sources: arXiv:1412.6980 algorithm 1; arXiv:1711.05101 algorithm 2.
    """

    rule = ADAM
    fused_rule = RULES[Adam]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)


class CPUAdamW(CPUAdam):
    """AdamW on the host: a drop-in for `torch.optim.AdamW`, with parameters anywhere; `CPUAdam` says the rest."""

    fused_rule = RULES[Adam]  # groups say that weight decay is decoupled

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `CPUAdam.load_state_dict`; one of Adam is welcome, and weight decay stays decoupled, as in torch."""
        groups = [{**group, "decoupled_weight_decay": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})
