"""The fused Adagrad step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..segments import AdagradSegment, Optimizer
from .common import optimizer_step


def adagrad_step(
    param: Tensor,
    grad: Tensor,
    state_sum: Tensor,
    segments: Sequence[AdagradSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Adagrad as ``torch.optim.Adagrad``, in place, in one pass. Moves 20 bytes an element.

    Arguments and errors as ``adam_step``, with one state, ``state_sum`` (fp32).

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods", JMLR 12 (2011), figure 1.
    """
    states = {"state_sum": state_sum}
    kind = AdagradSegment
    optimizer_step(
        "adagrad_step",
        Optimizer.ADAGRAD,
        kind,
        param,
        grad,
        states,
        segments,
        grad_scale,
        low_precision,
        backend,
    )
