"""A picture of some steps: what computed, what was gathered and what was reduced, and when, unit by unit.

In: the spans of `diagnostics`, and the forwards and backwards of the modules at which units are gathered. Out: a Chrome
trace (chrome://tracing, Perfetto), and a PNG.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .api import Sharded, sharded
from .diagnostics import Mark, Meter, Span, attach_meter
from .errors import ZeroError
from .flat_unit import FlatUnit
from .hooks import tensors_needing_grad
from .params import tensors_in

_ROWS = ("forward", "backward", "gather", "reduce")
_COLOURS = {"forward": "#4c78a8", "backward": "#72b7b2", "gather": "#f58518", "reduce": "#e45756"}


@dataclass(frozen=True)
class Event:
    """One bar: seconds from the start of the trace; `waited_s` of a collective is the part that compute waited."""

    row: str
    name: str
    start_s: float
    seconds: float
    waited_s: float = 0.0
    nbytes: int = 0


@contextmanager
def trace(model: nn.Module, path: str | Path, *, png: str | Path | None = None) -> Iterator[list[Event]]:
    """Record what this rank does inside the block; any rank may, no communication.

    Args:
        model: a sharded model.
        path: where to write the Chrome trace (JSON), when the block ends.
        png: where to draw the same; needs matplotlib.

    Yields:
        the events, filled when the block ends.

    Raises:
        ZeroError: `png` and no matplotlib; before the block runs.
    """
    if png is not None:
        _figure_class()
    state = sharded(model)
    meter = attach_meter(state)
    spans: list[Span] = []
    compute: list[tuple[str, str, Mark, Mark]] = []
    meter.sinks.append(spans)
    start = meter.mark()
    backwards: list[_Backward] = []
    end_of_pass = partial(_end_all, backwards, meter)
    state.reducer.listeners.append(end_of_pass)
    removers = _watch_compute(state, meter, compute, backwards)
    events: list[Event] = []
    try:
        yield events
    finally:
        for remover in removers:
            remover.remove()
        meter.sinks.remove(spans)
        state.reducer.listeners.remove(end_of_pass)
        compute += [
            ("backward", each.name, each.begun, each.ended)
            for each in backwards
            if each.begun is not None and each.ended is not None
        ]
        events += [
            Event(row, name, meter.seconds(start, begun), meter.seconds(begun, ended))
            for row, name, begun, ended in compute
        ]
        for span in spans:
            at, lasted = meter.seconds(start, span.launched), meter.seconds(span.launched, span.done)
            waited = meter.seconds(span.waited, span.done)
            events.append(Event(span.kind, span.name, at, lasted, waited, span.nbytes))
        events.sort(key=lambda event: event.start_s)
        _write(events, Path(path), state.wire.group.rank())
        if png is not None:
            _draw(events, Path(png))


@dataclass
class _Backward:
    """The backward of one call: from the first gradient of its outputs to the last one of its inputs."""

    name: str
    meter: Meter
    begun: Mark | None = None
    ended: Mark | None = None

    def begin(self, _: torch.Tensor) -> None:
        if self.begun is None:
            self.begun = self.meter.mark()

    def end(self, _: torch.Tensor) -> None:
        if self.begun is not None:
            self.ended = self.meter.mark()


def _end_all(backwards: list[_Backward], meter: Meter, unit: FlatUnit | None) -> None:
    """A pass is over, and with it what has no input that needs a gradient."""
    for each in backwards:
        if unit is None and each.begun is not None and each.ended is None:
            each.ended = meter.mark()


def _watch_compute(
    state: Sharded,
    meter: Meter,
    compute: list[tuple[str, str, Mark, Mark]],
    backwards: list[_Backward],
) -> list[RemovableHandle]:
    """Hook modules, and tensors for their backward: torch's full backward hooks would forbid to write in place."""
    begun: dict[nn.Module, list[tuple[Mark, _Backward]]] = {}

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        backward = _Backward(name, meter)
        if torch.is_grad_enabled():
            for tensor in tensors_in((args, kwargs)):
                if tensor.requires_grad:
                    tensor.register_hook(backward.end)
        begun.setdefault(module, []).append((meter.mark(), backward))

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if begun.get(module):
            mark, backward = begun[module].pop()
            compute.append(("forward", name, mark, meter.mark()))
            outputs = tensors_needing_grad(output)[0]
            for tensor in outputs:
                tensor.register_hook(backward.begin)
            if outputs:
                backwards.append(backward)

    names = {module: name for name, module in state.model.named_modules()}
    anchors = dict.fromkeys(anchor for unit in state.units for anchor in unit.anchors)
    removers: list[RemovableHandle] = []
    for module in anchors:
        name = names.get(module) or "(root)"
        removers += [
            module.register_forward_pre_hook(partial(enter, name), with_kwargs=True),
            module.register_forward_hook(partial(leave, name)),
        ]
    return removers


def _write(events: list[Event], path: Path, rank: int) -> None:
    """Trace event format: complete events, in microseconds."""
    rows: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": row}}
        for number, row in enumerate(_ROWS)
    ]
    rows += [
        {
            "ph": "X",
            "name": event.name,
            "cat": event.row,
            "pid": rank,
            "tid": _ROWS.index(event.row),
            "ts": event.start_s * 1e6,
            "dur": event.seconds * 1e6,
            "args": {"waited_us": event.waited_s * 1e6, "bytes": event.nbytes},
        }
        for event in events
    ]
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps({"traceEvents": rows}))
    beside.replace(path)


def _draw(events: list[Event], path: Path) -> None:
    figure = _figure_class()(figsize=(14, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(reversed(_ROWS)):
        bars = [event for event in events if event.row == row]
        spans = [(event.start_s * 1e3, event.seconds * 1e3) for event in bars]
        axes.broken_barh(
            spans, (number - 0.4, 0.8), facecolors=_COLOURS[row], edgecolor="white", linewidth=0.3
        )
        ends = [(event.start_s + event.seconds, event.waited_s) for event in bars if event.waited_s > 0]
        waits = [((end - waited) * 1e3, waited * 1e3) for end, waited in ends]
        axes.broken_barh(
            waits, (number - 0.4, 0.8), facecolors="none", edgecolor="black", hatch="////", linewidth=0
        )
    axes.set_yticks(range(len(_ROWS)), list(reversed(_ROWS)))
    axes.set_xlabel("ms (hatched: compute waits)")
    axes.set_xlim(left=0)
    figure.savefig(path, format="png", dpi=150)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ZeroError(
            'trace(png=...): it draws with matplotlib, which is not installed; pip install "zero-core[plot]"'
        ) from error
    return Figure
