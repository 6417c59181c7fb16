"""The fused AdamW / Adam step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..segments import AdamSegment, Optimizer
from .common import optimizer_step


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    segments: Sequence[AdamSegment],
    *,
    grad_scale: float | Tensor = 1.0,
    low_precision: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """AdamW or Adam in place, in one pass: unscale, clip, update, and write the low-precision copy.

    Equal to ``torch.optim.AdamW`` (``decoupled=True``) or ``torch.optim.Adam`` on ``grad * grad_scale``,
    without ``amsgrad``, ``maximize`` and ``capturable``. Elements outside all segments keep their values
    everywhere. Moves 28 bytes an element (16 read, 12 written), 2 more for ``low_precision``, 2 fewer for
    16-bit gradients.

    Args:
        param: fp32, flat, contiguous, n elements; updated. Parameters that require gradients are welcome.
        grad: fp32, bf16 or fp16, n elements; read.
        exp_avg: fp32, n elements; first moment, updated.
        exp_avg_sq: fp32, n elements; second moment, updated.
        segments: sorted, disjoint runs and their hyper-parameters.
        grad_scale: multiplies every gradient (1 / loss scale * clip factor). On CUDA a one-element tensor on
            the same device avoids a synchronisation.
        low_precision: bf16 or fp16, n elements; receives the updated parameters, rounded to nearest even.
        backend: ``"cpu"``, ``"cuda"``, ``"portable"``, ``"reference"``, or None for the best one here.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: sizes, devices, layout, overlap, read-only memory, segments out of order or range.
        BackendUnavailableError: ``backend`` cannot run here.

    Sources: arXiv:1412.6980 algorithm 1 (Adam); arXiv:1711.05101 algorithm 2 (AdamW).
    """
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    optimizer_step(
        "adam_step",
        Optimizer.ADAM,
        AdamSegment,
        param,
        grad,
        states,
        segments,
        grad_scale,
        low_precision,
        backend,
    )
