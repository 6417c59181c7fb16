"""Gradients averaged as they are: whole, in place, or to the part of each bucket that a rank keeps.

In: this rank's gradients. Out: their means. What all of a step needs of full precision goes this way: warm-up, and
0/1 Adam's updates of the variance. Next: `rules` steps with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from zero_core import Pending, Wire

from .bucket import Bucket
from .pipeline import pipeline


@dataclass
class _Flight:
    """A bucket's gradients on their way."""

    bucket: Bucket
    flat: Tensor | None = None
    pending: Pending | None = None

    def arrive(self) -> Tensor:
        """Wait for them."""
        assert self.flat is not None
        assert self.pending is not None
        self.pending.wait()
        return self.flat


def padded(numel: int, world: int) -> int:
    """The smallest multiple of `world` that holds `numel` elements."""
    return -(-numel // world) * world


def average(
    buckets: Sequence[Bucket],
    grads: list[Tensor | None],
    wire: Wire,
    *,
    dtype: torch.dtype | None,
    scale: float,
    scaled: bool,
    used: Collection[int] | None,
) -> None:
    """Replace gradients by their mean over ranks, as under data parallelism; every rank calls it.

    In place, and in `grads` by fp32 or other means of more digits where they travelled as such (`Bucket.scatter`).

    Args:
        buckets: all of them.
        grads: by the parameters' indices; a None of a parameter that moves becomes a tensor.
        wire: the ranks.
        dtype: on the wire; None: the parameters'.
        scale: this rank's own factor, applied before.
        scaled: some rank has a factor.
        used: what moves.

    Sends per rank: `wire_1bit.sent_exact` of each bucket.
    """
    rank, world = wire.group.rank(), wire.group.size()
    if world == 1 and scale == 1.0:
        return

    def send(flight: _Flight) -> None:
        bucket = flight.bucket
        flight.flat = _collect(bucket, grads, wire_dtype(bucket, dtype, scaled=scaled), world, scale)
        if world > 1:
            own = flight.flat.view(world, -1)[rank]
            flight.pending = wire.reduce(f"gradients of {bucket.plan.name}", flight.flat, own)

    def share(flight: _Flight) -> None:
        if world > 1:
            flat = flight.arrive()
            own = flat.view(world, -1)[rank]
            flight.pending = wire.gather(f"gradients of {flight.bucket.plan.name}", own, flat)

    def receive(flight: _Flight) -> None:
        flat = flight.arrive() if world > 1 else flight.flat
        assert flat is not None
        flight.bucket.scatter(flat, grads, used)
        flight.flat = None

    pipeline([_Flight(bucket) for bucket in buckets], send, share, receive)


def average_to_parts(
    buckets: Sequence[Bucket],
    grads: Sequence[Tensor | None],
    wire: Wire,
    *,
    dtype: torch.dtype | None,
    scale: float,
    scaled: bool,
) -> list[Tensor]:
    """The mean over ranks of this rank's part of each bucket, [padded / N], fp32; every rank calls it.

    Half of what `average` sends: the other half are the parameters, once they are stepped.
    """
    _rank, world = wire.group.rank(), wire.group.size()
    means: list[Tensor] = []

    def send(flight: _Flight) -> None:
        flat = flight.flat = _collect(
            flight.bucket, grads, wire_dtype(flight.bucket, dtype, scaled=scaled), world, scale
        )
        if world == 1:
            means.append(flat.float())
            return
        means.append(torch.empty(flat.numel() // world, device=flat.device))
        flight.pending = wire.reduce(f"gradients of {flight.bucket.plan.name}", flat, means[-1])

    def receive(flight: _Flight) -> None:
        if world > 1:
            flight.arrive()
        flight.flat = None

    pipeline([_Flight(bucket) for bucket in buckets], send, receive)
    return means


def publish_parts(buckets: Sequence[Bucket], wire: Wire, used: Collection[int] | None) -> None:
    """Gather the parameters that ranks have stepped a part of, in the parameters' dtype; every rank calls it."""
    rank, world = wire.group.rank(), wire.group.size()

    def send(flight: _Flight) -> None:
        bucket = flight.bucket
        assert bucket.master is not None
        flat = torch.empty(padded(bucket.plan.numel, world), dtype=bucket.dtype, device=bucket.device)
        own = flat.view(world, -1)[rank]
        own[: bucket.master.numel()].copy_(bucket.master)
        own[bucket.master.numel() :].zero_()
        flight.flat, flight.pending = flat, wire.gather(f"parameters of {bucket.plan.name}", own, flat)

    def receive(flight: _Flight) -> None:
        flight.bucket.publish(flight.bucket.moving(used), flight.arrive())
        flight.flat = None

    pipeline([_Flight(bucket) for bucket in buckets], send, receive)


def gather_whole(bucket: Bucket, key: str, wire: Wire) -> None:
    """Make a state tensor, of which every rank keeps a part, whole on all; every rank calls it."""
    rank, world = wire.group.rank(), wire.group.size()
    part = bucket.flat[key]
    flat = torch.zeros(padded(bucket.plan.numel, world), device=bucket.device)
    own = flat.view(world, -1)[rank]
    own[: part.numel()].copy_(part)
    wire.gather(f"{key} of {bucket.plan.name}", own, flat).wait()
    bucket.flat[key] = flat[: bucket.plan.numel]


def gather_mean(rows: Sequence[Tensor], numel: int, name: str, wire: Wire) -> Tensor:
    """The mean of rows, of which every rank brings its equal part, whole on all: [numel], fp32."""
    rank, world = wire.group.rank(), wire.group.size()
    flat = torch.zeros(padded(numel, world), device=wire.device)
    own = flat.view(world, -1)[rank]
    own[: rows[0].numel()].copy_(torch.stack(list(rows)).to(torch.float64).mean(0))
    wire.gather(f"mean of {name}", own, flat).wait()
    return flat[:numel]


def wire_dtype(bucket: Bucket, dtype: torch.dtype | None, *, scaled: bool) -> torch.dtype:
    """Gradients' on the wire, where `dtype` is what was asked for; float16 ones that are still scaled somewhere widen.

    `scaled` is every rank's (`Verdict`): a rank's own factor may be 1 where another's is not.
    """
    if dtype is None and scaled and bucket.dtype == torch.float16:
        return torch.float32
    return dtype or bucket.dtype


def _collect(
    bucket: Bucket, grads: Sequence[Tensor | None], wire: torch.dtype, world: int, scale: float
) -> Tensor:
    numel = padded(bucket.plan.numel, world)
    if scale == 1.0:
        return bucket.gather(grads, wire, numel)
    # Unscaled in fp32, and narrowed only then: the scale kept small gradients from being lost.
    return bucket.gather(grads, torch.float32, numel).mul_(scale).to(wire)
