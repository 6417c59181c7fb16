"""One step under way: what it sends, and whose gradients it is about.

In: gradients of this rank. Out: `Round`s, which `base` begins and finishes. Next: `exact` where gradients travel as
they are, `signs` where momenta do.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .verdict import Verdict


class Travel(enum.Enum):
    """What a step sends: gradients as they are, momenta as signs, or nothing."""

    EXACT = enum.auto()
    SIGNS = enum.auto()
    NOTHING = enum.auto()


@dataclass
class Round:
    """One step under way.

    Attributes:
        grads: by the parameters' indices: this rank's, or after an exact round the means (in the dtype in which they
            travelled where the gradients' own has fewer digits).
        parts: after an exact round whose buckets are sharded: the means of this rank's parts.
        scale: what gradients are still to be multiplied by.
        norm: 2-norm of the mean gradient; where that does not travel, an estimate (`common`). nan if not finite.
        seen: `fingerprint` of the gradients when it began.
        unscale: the factor of a scaler that it began with; None: gradients were taken as they are.
    """

    travel: Travel
    grads: list[Tensor | None]
    verdict: Verdict
    scale: float
    parts: list[Tensor] = field(default_factory=list)
    norm: float = math.nan
    seen: tuple[tuple[int, int], ...] = ()
    unscale: float | None = None


def fingerprint(grads: Sequence[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Which tensors they are, and how often they have been written to."""
    return tuple((0, 0) if grad is None else (id(grad), grad._version) for grad in grads)
