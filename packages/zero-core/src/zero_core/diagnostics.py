"""What the collectives of a model cost: bytes, waits, how much of them compute has hidden, and what lived at the peak.

In: the spans from a collective's launch to the end of the wait for it. Out: `diagnostics`, one flat dict; `tracing`
draws the same spans. Nothing is measured before the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .api import Sharded, sharded

Mark = Any
"""A moment: seconds on the CPU, an event on the compute stream of an accelerator."""


@dataclass
class Span:
    """One collective of a unit, from its launch to the end of the wait for it.

    Attributes:
        kind: "gather" or "reduce".
        name: the unit's label.
        nbytes: received by this rank.
        launched, waited, done: when it was launched, when compute came to need it, and when compute went on.
    """

    kind: str
    name: str
    nbytes: int
    launched: Mark
    ended: Callable[[Span], None]
    mark: Callable[[], Mark]
    waited: Mark = None
    done: Mark = None

    def __enter__(self) -> Span:
        self.waited = self.mark()
        return self

    def __exit__(self, *error: object) -> None:
        self.done = self.mark()
        self.ended(self)


@dataclass
class Totals:
    """Sums over spans."""

    num: int = 0
    nbytes: int = 0
    waited_s: float = 0.0
    on_the_way_s: float = 0.0


@dataclass
class Meter:
    """Observes the wires of one model.

    Attributes:
        totals: by kind, since the last report.
        sinks: lists that every span is added to.
        peak_whole_bytes: the most that whole parameters took at once at stage 3.
        peak_grad_bytes: the most that full gradients took at once.
    """

    state: Sharded
    totals: dict[str, Totals] = field(default_factory=dict)
    sinks: list[list[Span]] = field(default_factory=list)
    peak_whole_bytes: int = 0
    peak_grad_bytes: int = 0
    _open: list[Span] = field(default_factory=list)

    def begin(self, kind: str, name: str, full: torch.Tensor) -> Span:
        """See `collectives.Observer`."""
        size = self.state.wire.group.size()
        units, lanes = self.state.units, self.state.reducer.lanes
        whole = sum(unit.full.untyped_storage().nbytes() for unit in units if unit.stage == 3)
        grads = sum(_nbytes(lane.bucket.flat) for lane in lanes)
        if lanes and lanes[0].unit.stage >= 2:  # what is being reduced is no longer a bucket's
            grads += self.state.reducer.in_flight_bytes + (_nbytes(full) if kind == "reduce" else 0)
        self.peak_whole_bytes = max(self.peak_whole_bytes, whole)
        self.peak_grad_bytes = max(self.peak_grad_bytes, grads)
        return Span(kind, name, _nbytes(full) * (size - 1) // size, self.mark(), self._ended, self.mark)

    def mark(self) -> Mark:
        """Now."""
        if self.state.wire.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.state.wire.device).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, stop: Mark) -> float:
        """Between two marks; on an accelerator it waits for the second."""
        if isinstance(start, float):
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def _ended(self, span: Span) -> None:
        self._open.append(span)
        for sink in self.sinks:
            sink.append(span)
        while self._open and (isinstance(span.done, float) or self._open[0].done.query()):
            self._add(self._open.pop(0))

    def _add(self, span: Span) -> None:
        totals = self.totals.setdefault(span.kind, Totals())
        totals.num += 1
        totals.nbytes += span.nbytes
        totals.waited_s += self.seconds(span.waited, span.done)
        totals.on_the_way_s += self.seconds(span.launched, span.done)

    def report(self) -> dict[str, float]:
        """Totals since the last report, which starts them anew."""
        while self._open:
            self._add(self._open.pop(0))
        gathers, reduces = (self.totals.get(kind, Totals()) for kind in ("gather", "reduce"))
        waited, on_the_way = (
            gathers.waited_s + reduces.waited_s,
            gathers.on_the_way_s + reduces.on_the_way_s,
        )
        turns = None if self.state.gatherer is None else self.state.gatherer.turns
        found: dict[str, float] = {
            "gathers": gathers.num,
            "gathered_bytes": gathers.nbytes,
            "gather_waited_s": gathers.waited_s,
            "reductions": reduces.num,
            "reduced_bytes": reduces.nbytes,
            "reduce_waited_s": reduces.waited_s,
            "on_the_way_s": on_the_way,
            "hidden_fraction": 1.0 - waited / on_the_way if on_the_way else 1.0,
            "prefetch_hits": 0 if turns is None else turns.num_hits,
            "prefetch_misses": 0 if turns is None else turns.num_misses,
            "peak_whole_parameter_bytes": self.peak_whole_bytes,
            "peak_full_gradient_bytes": self.peak_grad_bytes,
            "resting_parameter_bytes": sum(_rests(self.state)),
            "gradient_shard_bytes": sum(_nbytes(lane.shard.value) for lane in self.state.reducer.lanes),
        }
        self.totals.clear()
        self.peak_whole_bytes = self.peak_grad_bytes = 0
        if turns is not None:
            turns.num_hits = turns.num_misses = 0
        return found


def diagnostics(model: nn.Module) -> dict[str, float]:
    """What the model's collectives and buffers came to on this rank since the last call; no communication.

    The first call starts the measurement and finds nothing yet. Call it once a step and log it.

    Returns:
        `gathers`, `gathered_bytes` (received), `gather_waited_s`, and the same for reductions; `on_the_way_s`: seconds
        from launch to completion, summed; `hidden_fraction`: the part of them in which compute went on (1 where
        nothing was sent); `prefetch_hits`, `prefetch_misses`: units at stage 3 that were sent for before they were
        needed, and that were not; `peak_whole_parameter_bytes` (stage 3), `peak_full_gradient_bytes`; and what rests:
        `resting_parameter_bytes` (parameters and separate masters), `gradient_shard_bytes`.
    """
    return attach_meter(sharded(model)).report()


def attach_meter(state: Sharded) -> Meter:
    """The model's meter, which measures from the first call on."""
    if state.meter is None:
        state.meter = Meter(state)
        state.wire.observer = state.reducer.wire.observer = state.meter
    return state.meter


def _rests(state: Sharded) -> list[int]:
    tensors = [t for unit in state.units for t in (unit.shard, unit.master) if t is not None]
    tensors += [unit.full for unit in state.units if unit.stage < 3]
    return list({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _nbytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
