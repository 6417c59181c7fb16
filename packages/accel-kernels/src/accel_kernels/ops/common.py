"""What the optimizer steps share: check everything, pick the back end, run it, tell autograd what changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import checks
from ..dispatch import choose
from ..segments import Optimizer, Segment, check_segments


def optimizer_step(
    op: str,
    optimizer: Optimizer,
    kind: type,
    param: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    segments: Iterable[Segment],
    grad_scale: float | Tensor,
    low_precision: Tensor | None,
    backend: str | None,
) -> None:
    """One fused step; the public functions of ``ops`` give it their names and states."""
    segments = tuple(segments)
    roles: list[checks.Role] = [
        ("param", param, checks.SINGLE, True),
        ("grad", grad, checks.FLOATS, False),
        *((name, state, checks.SINGLE, True) for name, state in states.items()),
    ]
    if low_precision is not None:
        roles.append(("low_precision", low_precision, checks.HALVES, True))
    checks.check_flat(op, roles)
    check_segments(op, segments, kind, param.numel())
    scale = checks.check_grad_scale(op, grad_scale, param.device)
    chosen = choose(op, param.device, backend)
    chosen.step(optimizer, param, grad, tuple(states.values()), segments, scale, low_precision)
    mark_written(param, low_precision)


def mark_written(*tensors: Tensor | None) -> None:
    """Bump the tensors' versions, so that a backward pass that saved one before this call fails loudly."""
    written = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
    torch.autograd.graph.increment_version(written)
