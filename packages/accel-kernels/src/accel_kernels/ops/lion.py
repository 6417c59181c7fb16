"""The fused Lion step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..segments import LionSegment, Optimizer
from .common import optimizer_step


def lion_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    segments: Sequence[LionSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Lion with decoupled weight decay, in place, in one pass. Moves 20 bytes an element.

    Arguments and errors as ``adam_step``, with one state, ``exp_avg`` (fp32).

    Source: Chen et al., arXiv:2302.06675, program 1.
    """
    states = {"exp_avg": exp_avg}
    optimizer_step(
        "lion_step",
        Optimizer.LION,
        LionSegment,
        param,
        grad,
        states,
        segments,
        grad_scale,
        low_precision,
        backend,
    )
