"""``reference`` as a back end: the plain torch statement of each op, on the whole tensor at once."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..reference import step

__all__ = ["add_norm", "cast", "step"]


def add_norm(grad: Tensor, scale: float, out: Tensor) -> None:
    """See ``dispatch.Backend``."""
    reference.grad_norm_scale(grad, scale=scale, out=out)


def cast(src: Tensor, dst: Tensor, scale: float, stochastic: bool, seed: int) -> None:
    """See ``dispatch.Backend``."""
    reference.cast_copy(src, dst, scale=scale, stochastic=stochastic, seed=seed)
