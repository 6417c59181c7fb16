"""One step under way: what it sends, whose gradients it is about, and a bucket's momentum on its way.

In: gradients of this rank. Out: `Round`s, which `base` begins and finishes. Next: `exact` where gradients travel as
they are, `allreduce_1bit` where momenta do as signs.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from zero_core import Wire

from ..allreduce_1bit import OneBitReduction, OneBitState
from .bucket import Bucket
from .kinds import Held
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
        grads: by the parameters' indices: this rank's, or after an exact round the means.
        parts: after an exact round whose buckets are sharded: the means of this rank's parts.
        scale: what gradients are still to be multiplied by.
        norm: 2-norm of the mean gradient; where that does not travel, the root of the mean over ranks of squared
            norms, which is no smaller. nan if not finite.
    """

    travel: Travel
    grads: list[Tensor | None]
    verdict: Verdict
    scale: float
    parts: list[Tensor] = field(default_factory=list)
    norm: float = math.nan
    seen: tuple[tuple[int, int], ...] = ()


@dataclass
class SignFlight:
    """A bucket whose momentum is on its way."""

    bucket: Bucket
    state: OneBitState
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    reduction: OneBitReduction | None = None


def fingerprint(grads: Sequence[Tensor | None]) -> tuple[tuple[int, int], ...]:
    """Which tensors they are, and how often they have been written to."""
    return tuple((0, 0) if grad is None else (id(grad), grad._version) for grad in grads)


def kept_of(
    bucket: Bucket, state: OneBitState, wire: Wire, used: frozenset[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """Copies of what belongs to parameters that do not move, with the places they came from.

    They travel with their bucket, and so are reduced like the others: what that does to them is undone.
    """
    resting = bucket.resting(used)
    if not resting:
        return []
    tensors = [(flat, 0) for key, flat in bucket.flat.items() if key != "server_error"]
    start = Held.CHUNK.span(bucket.plan.numel, wire.group.size(), wire.group.rank())[0]
    tensors.append((state.server_error, start))
    places = [
        flat[max(slot.start - offset, 0) : max(slot.stop - offset, 0)]
        for flat, offset in tensors
        for slot in resting
    ]
    return [(place, place.clone()) for place in places if place.numel()]
