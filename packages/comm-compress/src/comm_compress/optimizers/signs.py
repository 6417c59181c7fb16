"""Momenta averaged by signs, bucket after bucket, so that one travels while another is computed.

In: buckets, and what to do before and after. Out: means at one bit an element, everything that belongs to parameters at
rest as it was. Next: `after` steps with them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from zero_core import Wire

from ..allreduce_1bit import OneBitReduction, OneBitState, start_allreduce_1bit
from ..traffic import Stopwatch
from .bucket import Bucket
from .kinds import Held
from .layout import Slot
from .pipeline import pipeline


@dataclass
class _Flight:
    """A bucket whose momentum is on its way."""

    bucket: Bucket
    state: OneBitState
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    reduction: OneBitReduction | None = None

    def advance(self, wire: Wire, codec: Stopwatch) -> Tensor:
        """Wait for what comes, and do what is next; the tensor, with its mean when that is done twice."""
        assert self.reduction is not None
        self.reduction.arrive()
        with codec.running(wire.device):
            self.reduction.advance()
        return self.reduction.tensor


def average_by_signs(
    buckets: Sequence[Bucket],
    states: Mapping[str, OneBitState],
    wire: Wire,
    used: Collection[int] | None,
    *,
    before: Callable[[Bucket], Tensor],
    after: Callable[[Bucket, Tensor], None],
    codec: Stopwatch,
) -> None:
    """Take every bucket through the 1-bit all-reduce; every rank calls it.

    Args:
        buckets: all of them.
        states: residuals, by the buckets' names.
        wire: the ranks.
        used: what moves; what is kept for the rest is as it was when this returns.
        before: makes what is to be averaged: [bucket], fp32.
        after: takes the mean, in that same tensor.
        codec: counts the time of packing and reading signs.

    Sends per rank: `wire_1bit.sent_1bit` of each bucket.
    """

    def send(flight: _Flight) -> None:
        flight.kept = _kept(flight.bucket, flight.state, wire, used)
        tensor = before(flight.bucket)
        with codec.running(wire.device):
            flight.reduction = start_allreduce_1bit(tensor, wire, flight.state)

    def serve(flight: _Flight) -> None:
        flight.advance(wire, codec)

    def receive(flight: _Flight) -> None:
        after(flight.bucket, flight.advance(wire, codec))
        for place, values in flight.kept:
            place.copy_(values)
        flight.kept, flight.reduction = [], None

    pipeline([_Flight(bucket, states[bucket.plan.name]) for bucket in buckets], send, serve, receive)


def _kept(
    bucket: Bucket, state: OneBitState, wire: Wire, used: Collection[int] | None
) -> list[tuple[Tensor, Tensor]]:
    """What belongs to parameters that do not move.

    They travel with their bucket, and so are reduced like the others: what that does to them is undone.
    """
    others = [(bucket.flat[key], 0) for key in bucket.flat.keys() - {"server_error", "worker_error"}]
    return kept([*others, *residuals(bucket, state, wire)], bucket.resting(used))


def residuals(bucket: Bucket, state: OneBitState, wire: Wire) -> list[tuple[Tensor, int]]:
    """What is owed for a bucket, with the bucket's element at which each tensor begins."""
    start = Held.CHUNK.span(bucket.plan.numel, wire.group.size(), wire.group.rank())[0]
    return [(state.worker_error, 0), (state.server_error, start)]


def kept(tensors: Sequence[tuple[Tensor, int]], slots: Sequence[Slot]) -> list[tuple[Tensor, Tensor]]:
    """Copies of what belongs to some parameters, with the places they came from.

    Args:
        tensors: and the bucket's element at which each begins.
        slots: of the bucket.
    """
    places = [
        flat[max(slot.start - offset, 0) : max(slot.stop - offset, 0)]
        for flat, offset in tensors
        for slot in slots
    ]
    return [(place, place.clone()) for place in places if place.numel()]
