"""The fused SGD step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import AccelValueError
from ..segments import Optimizer, SgdSegment
from .common import optimizer_step


def sgd_step(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    segments: Sequence[SgdSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """SGD as ``torch.optim.SGD``, in place, in one pass. Moves 12 bytes an element, 20 with momentum.

    Arguments and errors as ``adam_step``, with one optional state: ``momentum_buffer`` (fp32) may be None
    where no segment has momentum, and is left alone by segments without.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013,
    section 2.
    """
    segments = tuple(segments)
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    if momentum_buffer is None:
        for k, segment in enumerate(segments):
            if isinstance(segment, SgdSegment) and segment.momentum != 0:
                raise AccelValueError(
                    f"sgd_step: momentum_buffer: expected a tensor, since segments[{k}] has momentum "
                    f"{segment.momentum}, got None"
                )
    optimizer_step(
        "sgd_step",
        Optimizer.SGD,
        SgdSegment,
        param,
        grad,
        states,
        segments,
        grad_scale,
        low_precision,
        backend,
    )
