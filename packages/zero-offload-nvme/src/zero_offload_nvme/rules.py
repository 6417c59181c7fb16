"""How each optimizer maps to a kernel: its states, the hyper-parameters of a step, the options that it has not.

In: a parameter group, and a count of steps. Out: a segment of accel-kernels. Next: `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import accel_kernels as ak

from .errors import OffloadConfigError

Group = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One optimizer.

    Attributes:
        kind: the segment class that names the kernel.
        states: names of its fp32 states, as torch has them, in the kernel's order.
        segment: (group, step) -> hyper-parameters.
        counts: whether it keeps torch's `step`.
        initial: what a group's states begin with.
        eager: whether states exist before the first gradient, as torch's Adagrad has it.
    """

    kind: type[Any]
    states: tuple[str, ...]
    segment: Callable[[Group, int], Any]
    counts: bool = True
    initial: Callable[[Group], float] = lambda group: 0.0
    eager: bool = False


def _adam(group: Group, step: int) -> ak.AdamSegment:
    beta1, beta2 = group["betas"]
    return ak.AdamSegment(
        start=0, stop=0, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2), eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]), step=step, decoupled=bool(group["decoupled_weight_decay"]),
    )  # fmt: skip


def _adagrad(group: Group, step: int) -> ak.AdagradSegment:
    return ak.AdagradSegment(
        start=0, stop=0, lr=float(group["lr"]), lr_decay=float(group["lr_decay"]), eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]), step=step,
    )  # fmt: skip


def _lion(group: Group, step: int) -> ak.LionSegment:
    beta1, beta2 = group["betas"]
    return ak.LionSegment(
        start=0, stop=0, lr=float(group["lr"]), beta1=float(beta1), beta2=float(beta2),
        weight_decay=float(group["weight_decay"]),
    )  # fmt: skip


ADAM = Rule(kind=ak.AdamSegment, states=("exp_avg", "exp_avg_sq"), segment=_adam)
ADAGRAD = Rule(
    kind=ak.AdagradSegment,
    states=("sum",),
    segment=_adagrad,
    initial=lambda group: float(group["initial_accumulator_value"]),
    eager=True,
)
LION = Rule(kind=ak.LionSegment, states=("exp_avg",), segment=_lion, counts=False)

# torch's other options, and what each would have to be here.
REFUSED: Mapping[str, str] = {
    "amsgrad": "keep no maximum of second moments",
    "maximize": "minimize; negate the loss",
    "differentiable": "record no graph of the step",
    "capturable": "run on the host, outside any CUDA graph",
}


def check_group(name: str, group: Group) -> None:
    """Refuse what a group asks for and the kernels do not do.

    Raises:
        OffloadConfigError: an option of torch that is not there, or a value out of range.
    """
    for option, instead in REFUSED.items():
        if group.get(option):
            raise OffloadConfigError(f"{name}: {option}=True: expected False, for these optimizers {instead}")
    for option in ("lr", "eps", "weight_decay", "lr_decay", "initial_accumulator_value"):
        if option in group and not (float(group[option]) >= 0 and math.isfinite(float(group[option]))):
            raise OffloadConfigError(f"{name}: {option}: expected a finite number >= 0, got {group[option]}")
    for beta in group.get("betas", ()):
        if not 0 <= float(beta) < 1:
            raise OffloadConfigError(f"{name}: betas: expected 0 <= beta < 1, got {group['betas']}")
