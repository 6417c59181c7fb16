"""Sum of squares and overflow check of gradients, in one read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..dispatch import choose
from ..errors import AccelTypeError, AccelValueError


def grad_norm_scale(
    grads: Tensor | Sequence[Tensor],
    *,
    scale: float = 1.0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sum of squares of ``scale * grads`` in fp64, and how many elements are not finite; in one read.

    The norm is the square root of the first number. It is accumulated in fp64 and not finite as soon as an
    element is not. On the CPU it has the same bits whatever the number of threads and the instruction set.
    Moves 4 bytes an fp32 element, 2 a 16-bit one. On CUDA nothing waits for the device.

    Args:
        grads: one flat contiguous tensor or a sequence of them on one device, each fp32, bf16 or fp16, of any
            size.
        scale: multiplies every element before squaring.
        out: fp64, 2 elements, same device; the results are added to it. None makes a new one (on the CPU for
            an empty sequence).
        backend: as in ``adam_step``.

    Returns:
        ``out``: ``[sum of squares, number of non-finite elements]``.

    Raises:
        AccelTypeError: wrong type or dtype.
        AccelValueError: devices or layout.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    op = "grad_norm_scale"
    tensors = (grads,) if isinstance(grads, Tensor) else tuple(grads)
    single = isinstance(grads, Tensor)
    for k, grad in enumerate(tensors):
        checks.check_flat(op, [("grads" if single else f"grads[{k}]", grad, checks.FLOATS, False)])
        if grad.device != tensors[0].device:
            raise AccelValueError(
                f"{op}: grads[{k}]: expected a tensor on {tensors[0].device}, got {grad.device}"
            )
    if not isinstance(scale, (float, int)):
        raise AccelTypeError(f"{op}: scale: expected a number, got {type(scale).__name__}")
    device = tensors[0].device if tensors else torch.device("cpu")
    if out is None:
        out = torch.zeros(2, dtype=torch.float64, device=device)
    else:
        checks.check_flat(op, [("out", out, (torch.float64,), True)])
        if out.numel() != 2 or (tensors and out.device != device):
            raise AccelValueError(
                f"{op}: out: expected 2 elements on {device}, got {out.numel()} on {out.device}"
            )
    chosen = choose(op, out.device, backend)
    for grad in tensors:
        if grad.numel() > 0:
            chosen.add_norm(grad, float(scale), out)
    return out
