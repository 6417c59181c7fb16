"""What the steps of an optimizer have put on the wire, beside what uncompressed ones would have.

In: steps, as they are taken. Out: the lines of `comm_compress.traffic`. Agreements (32 bytes a step) are not in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ..traffic import Entry, Stopwatch
from ..wire import NOTHING, Sent
from ..wire_1bit import sent_1bit, sent_exact
from .bucket import Bucket
from .exact import wire_dtype


class StepCounts:
    """Of one optimizer on this rank; `dtype` below is its `Compression.reduce_dtype`."""

    def __init__(self) -> None:
        self._exact = Entry("gradients")
        self._signs = Entry("signs of momenta")
        self._nothing = Entry("nothing")
        self._freeze = Entry("state at the freeze")

    @property
    def codec(self) -> Stopwatch:
        """The time of packing and reading signs."""
        return self._signs.codec

    def entries(self) -> Iterator[Entry]:
        """One for each kind of step that there was."""
        return (each for each in (self._exact, self._signs, self._nothing, self._freeze) if each.calls)

    def exact(
        self,
        buckets: Sequence[Bucket],
        group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        *,
        scaled: bool,
        parts: bool,
    ) -> None:
        """A step that averages gradients, to `parts` where parameters are gathered afterwards; see `exact`."""
        plain = self._plain(buckets, group, dtype, scaled=scaled)
        self._exact.begin(plain)
        if not parts:
            self._exact.sent += plain
            return
        for bucket in buckets:
            grads = sent_exact(
                bucket.plan.numel, group.size(), wire_dtype(bucket, dtype, scaled=scaled).itemsize
            )
            values = sent_exact(bucket.plan.numel, group.size(), bucket.dtype.itemsize)
            self._exact.sent += Sent(across=grads.scatter + values.gather)

    def signs(
        self,
        buckets: Sequence[Bucket],
        group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        *,
        in_step: bool = True,
    ) -> None:
        """A step that sends signs; or signs outside of any step, which uncompressed training would not send at all."""
        self._signs.begin(self._plain(buckets, group, dtype) if in_step else NOTHING)
        numbers = [sent_1bit(bucket.plan.numel, group.size(), group.rank()).total for bucket in buckets]
        self._signs.sent += Sent(across=sum(numbers))

    def at_rest(self, numel: int, group: dist.ProcessGroup) -> None:
        """Beside signs, fp32 momenta of what did not move went to every other rank."""
        self._signs.sent += Sent(across=4 * numel * (group.size() - 1))

    def nothing(self, buckets: Sequence[Bucket], group: dist.ProcessGroup, dtype: torch.dtype | None) -> None:
        """A step that sends nothing."""
        self._nothing.begin(self._plain(buckets, group, dtype))

    def gathered(self, bucket: Bucket, group: dist.ProcessGroup, *, tensors: int) -> None:
        """At the freeze, sharded fp32 state tensors were made whole."""
        self._freeze.begin(NOTHING)
        self._freeze.sent += Sent(across=tensors * sent_exact(bucket.plan.numel, group.size(), 4).gather)

    def _plain(
        self,
        buckets: Sequence[Bucket],
        group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        *,
        scaled: bool = False,
    ) -> Sent:
        sizes = [(bucket.plan.numel, wire_dtype(bucket, dtype, scaled=scaled).itemsize) for bucket in buckets]
        return Sent(across=sum(sent_exact(numel, group.size(), itemsize).total for numel, itemsize in sizes))
