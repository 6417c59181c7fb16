"""What collectives have put on the wire, what that cost in codecs, and whether it pays.

In: counts, made where messages are sent (`hops`) and where codecs run. Out: `traffic(...)`, a table.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .errors import CompressConfigError
from .wire import NOTHING, Sent

_MOST_OPEN = 1024
"""Pairs of an accelerator's events that are kept: the oldest of so many is long past, and nobody waits for it."""


class Stopwatch:
    """Adds up times of one device: the processor's clock, or an accelerator's stream."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._open: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside the block."""
        if device.type == "cpu":
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - began
            return
        start, stop = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        try:
            yield
        finally:
            stop.record()
            self._open.append((start, stop))
            while len(self._open) > _MOST_OPEN:
                self._fold()

    @property
    def seconds(self) -> float:
        """So far; waits for an accelerator."""
        while self._open:
            self._fold()
        return self._seconds

    def _fold(self) -> None:
        """Add the oldest time."""
        start, stop = self._open.popleft()
        stop.synchronize()
        self._seconds += start.elapsed_time(stop) / 1e3


@dataclass
class Entry:
    """One kind of collective on this rank, since it was made.

    Attributes:
        kind: such as "gather" or "reduce".
        calls: how often.
        plain: bytes that the same calls would have sent uncompressed.
        sent: bytes that were sent.
        codec: time in codecs.
        is_timed: whether it is counted; torch's own hooks do not tell.
        note: what the policy has decided, for people.
    """

    kind: str
    calls: int = 0
    plain: Sent = NOTHING
    sent: Sent = NOTHING
    codec: Stopwatch = field(default_factory=Stopwatch)
    is_timed: bool = True
    note: str = ""

    def begin(self, plain: Sent) -> None:
        """A call begins, that would send so much uncompressed."""
        self.calls += 1
        self.plain += plain

    def count(self, nbytes: int, *, near: bool) -> None:
        """A message is sent, to a rank of the same node or not."""
        self.sent += Sent(inside=nbytes) if near else Sent(across=nbytes)


class Counted(Protocol):
    """What `traffic` can be asked about."""

    def entries(self) -> Iterable[Entry]:
        """One for each kind of collective; several of one kind are added up."""


@dataclass(frozen=True)
class Line:
    """One line of a report; bytes are those that one rank sends.

    Attributes:
        kind: of collective.
        calls: how often.
        plain: what would have been sent uncompressed.
        sent: what was.
        codec_s: seconds in codecs; None: nobody has measured them.
        note: what the policy has decided.
    """

    kind: str
    calls: int
    plain: Sent
    sent: Sent
    codec_s: float | None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times less was sent; 1 where nothing would have been either way, inf where nothing was."""
        if not self.sent.total:
            return float("inf") if self.plain.total else 1.0
        return self.plain.total / self.sent.total

    @property
    def break_even_bytes_per_s(self) -> float | None:
        """The bandwidth, bytes a second for this rank, below which compression pays: bytes saved / codec time.

        The bytes are those between nodes, where there are any; 0 where compression never pays, inf where it costs
        nothing, None where nobody has measured what it costs.
        """
        saved = (
            self.plain.across - self.sent.across if self.plain.across else self.plain.total - self.sent.total
        )
        if saved <= 0:
            return 0.0
        if self.codec_s is None:
            return None
        return saved / self.codec_s if self.codec_s else float("inf")


@dataclass(frozen=True)
class Traffic:
    """What one rank has sent; prints as a table.

    Attributes:
        lines: by kind of collective.
    """

    lines: tuple[Line, ...]

    @property
    def total(self) -> Line:
        """All kinds together."""
        sent = plain = NOTHING
        for line in self.lines:
            sent, plain = sent + line.sent, plain + line.plain
        calls = sum(line.calls for line in self.lines)
        return Line("total", calls, plain, sent, _sum(*(line.codec_s for line in self.lines)))

    def line(self, kind: str) -> Line:
        """The line of one kind; all zeros if there were no calls."""
        return next(
            (line for line in self.lines if line.kind == kind), Line(kind, 0, NOTHING, NOTHING, codec_s=0.0)
        )

    def __str__(self) -> str:
        head = [
            "collective",
            "calls",
            "MB uncompressed",
            "MB sent",
            "of it across",
            "ratio",
            "codec s",
            "pays below",
        ]
        rows = [head, *(_cells(line) for line in (*self.lines, self.total))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        text = []
        for row in rows:
            first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            text.append("  ".join([row[0].ljust(len(first)), *rest]))
        return "\n".join([*text, *(f"{line.kind}: {line.note}" for line in self.lines if line.note)])


def _cells(line: Line) -> list[str]:
    pays = line.break_even_bytes_per_s
    return [
        line.kind,
        str(line.calls),
        f"{line.plain.total / 1e6:.3f}",
        f"{line.sent.total / 1e6:.3f}",
        f"{line.sent.across / 1e6:.3f}",
        f"{line.ratio:.2f}",
        "?" if line.codec_s is None else f"{line.codec_s:.4f}",
        _speed(pays),
    ]


def _speed(bytes_per_s: float | None) -> str:
    if bytes_per_s is None:
        return "?"
    if not bytes_per_s:
        return "-"
    return "any" if bytes_per_s == float("inf") else f"{bytes_per_s * 8 / 1e6:,.0f} Mb/s"


def _sum(*seconds: float | None) -> float | None:
    """None where one of them is."""
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


def traffic(counted: Counted) -> Traffic:
    """What this rank has sent through some collectives, and whether compression pays; no communication.

    Args:
        counted: a `QuantizedCollectives` (with all that were made of it), what `ddp_hook` or `compress_fsdp` returned,
            or an optimizer of this package.

    Returns:
        a `Traffic`: exact bytes by kind of collective. On an accelerator a gather counts as one message to each rank,
        whatever way the back end takes.

    Raises:
        CompressConfigError: `counted` is something else.
    """
    ask = getattr(counted, "entries", None)
    if ask is None:
        raise CompressConfigError(
            f"traffic: expected QuantizedCollectives, a hook of ddp_hook, what compress_fsdp returned, or an optimizer "
            f"of comm_compress, got {type(counted).__name__}"
        )
    found: dict[str, Line] = {}
    for entry in ask():
        before = found.get(entry.kind, Line(entry.kind, 0, NOTHING, NOTHING, 0.0))
        notes = dict.fromkeys(note for note in (before.note, entry.note) if note)
        found[entry.kind] = Line(
            entry.kind,
            before.calls + entry.calls,
            before.plain + entry.plain,
            before.sent + entry.sent,
            _sum(before.codec_s, entry.codec.seconds if entry.is_timed else None),
            "; ".join(notes),
        )
    return Traffic(tuple(line for line in found.values() if line.calls))
