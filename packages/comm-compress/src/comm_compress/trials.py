"""`policy="auto"`: whether gathers and whether reductions pay to compress, measured in the first passes of training.

In: a collective, and both ways to run it. Out: one of the two, by turns while it is measured, then the faster one, the
same on all ranks.

Note [What a pass costs]
A pass lasts from one call of a kind to the next with the same tag. What counts is what training pays for it: the time
until calls return and the time in waits, of gathers and reductions together, since what one of them sends keeps the
others off the wire; not what passes beside compute. Gathers change their way with every pass, reductions with every
second, so that of the passes of either way half had the other kind compressed, wherever passes begin.

Note [One decision]
All ranks make the same calls of one kind in the same order, so the n-th pass is the same one everywhere. When the last
pass is over each rank tells the others its times, and when the next one is, by when every rank has sent its own, all
take the slowest rank's: nobody waits for a rank that has yet to get there.
"""

from __future__ import annotations

import logging
import statistics
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import zero_core as zero

from .hops import Hop
from .traffic import Entry, Stopwatch

logger = logging.getLogger(__name__)

NUM_PASSES = 8
"""Half of them either way; a multiple of four. One before them does not count."""
_TURN = {"gather": 0, "reduce": 1}
"""Passes of one way in a row, as a power of two; see Note [What a pass costs]."""


class Spending:
    """Time in the collectives of one model, by the passes of those that are being measured."""

    def __init__(self) -> None:
        self._measuring: weakref.WeakSet[Trial] = weakref.WeakSet()

    @property
    def is_measured(self) -> bool:
        """Whether somebody wants to know."""
        return bool(self._measuring)

    def watch(self) -> Stopwatch:
        """A stopwatch whose time counts for the pass that each of them is in."""
        watch = Stopwatch()
        for trial in self._measuring:
            trial.passes[-1].append(watch)
        return watch

    def begin(self, trial: Trial) -> None:
        """Somebody measures."""
        self._measuring.add(trial)

    def end(self, trial: Trial) -> None:
        """And has done."""
        self._measuring.discard(trial)


class Trial:
    """Decides for one kind of collective of one group.

    Args:
        kind: which of the two.
        entry: of the kind; gets the decision as a note.
        hop: all ranks.
        device: where small numbers travel from.
        spending: of both kinds.

    Attributes:
        passes: what was spent in each.
    """

    def __init__(
        self,
        kind: Literal["gather", "reduce"],
        entry: Entry,
        hop: Hop,
        device: torch.device,
        spending: Spending,
    ) -> None:
        self.entry = entry
        self.hop = hop
        self.device = device
        self.spending = spending
        self.passes: list[list[Stopwatch]] = [[]]
        self._turn = _TURN[kind]
        self._tags: set[int] = set()  # of this pass
        self._versions: dict[tuple[int, int], tuple[int, bool]] = {}
        self._asked: tuple[zero.Handle, list[torch.Tensor]] | None = None
        self._verdict: bool | None = None

    def run(
        self, nbytes: int, tag: int, version: int | None, ways: Callable[[bool], zero.Handle]
    ) -> zero.Handle:
        """Run one collective.

        Args:
            nbytes: of the whole buffer.
            tag: its own.
            version: calls of one tag and one version (not None) go one way.
            ways: starts it, compressed or not.
        """
        compressed = self._choose((nbytes, tag), version)
        if not self.spending.is_measured:
            return ways(compressed)
        watch = self.spending.watch()
        with watch.running(self.device):
            handle = ways(compressed)
        return _Watched(handle, watch, self.device)

    def _choose(self, key: tuple[int, int], version: int | None) -> bool:
        before = self._versions.get(key)
        if version is not None and before is not None and before[0] == version:
            return before[1]
        if self._verdict is None:
            if key[1] in self._tags:
                self._next_pass()
            self._tags.add(key[1])
        compressed = self._verdict
        if compressed is None:
            compressed = self._goes_compressed(len(self.passes) - 1)
        if version is not None:
            self._versions[key] = version, compressed
        return compressed

    def _goes_compressed(self, number: int) -> bool:
        return (number >> self._turn) % 2 == 0

    def _next_pass(self) -> None:
        """See Note [One decision]."""
        if self._asked is not None:
            self._decide(*self._asked)
            return
        self._tags.clear()
        if (
            len(self.passes) == 1
        ):  # not before: weights that nobody trains have one version, and no second pass
            self.spending.begin(self)
        if len(self.passes) == 1 + NUM_PASSES:
            self._asked = self._ask()
        self.passes.append([])

    def _decide(self, handle: zero.Handle, heard: list[torch.Tensor]) -> None:
        handle.wait()
        plain, compressed = torch.stack(heard).amax(0).tolist()
        self._verdict = compressed < plain
        self.spending.end(self)
        self.passes.clear()
        verdict = "compressed" if self._verdict else "as they are, since compression does not pay"
        self.entry.note = (
            f"travel {verdict} (a pass pays {plain * 1e3:.2f} ms for collectives, {compressed * 1e3:.2f} ms if these "
            "are compressed)"
        )
        if self.hop.rank == 0:
            logger.info("%s: %s", self.entry.kind, self.entry.note)

    def _ask(self) -> tuple[zero.Handle, list[torch.Tensor]]:
        seconds = [self._median_s(compressed=False), self._median_s(compressed=True)]
        own = torch.tensor(seconds, dtype=torch.float64, device=self.device).view(torch.uint8)
        heard: list[torch.Tensor] = []

        def hear(parts: Sequence[torch.Tensor]) -> None:
            heard.extend(part.clone().view(torch.float64) for part in parts)

        # A tag of its own: what units send meanwhile must not be taken for it.
        return self.hop.gather(own, 0x2AAAAAAA ^ self._turn, hear, Entry("decision")), heard

    def _median_s(self, *, compressed: bool) -> float:
        """Of the passes that went this way on this rank."""
        return statistics.median(
            sum(watch.seconds for watch in each)
            for number, each in enumerate(self.passes)
            if number and self._goes_compressed(number) == compressed
        )


@dataclass
class _Watched:
    """A handle whose waits are timed."""

    inner: zero.Handle
    watch: Stopwatch
    device: torch.device

    def is_done(self) -> bool:
        """Whether `wait` need not wait for another rank."""
        ask: Callable[[], bool] | None = getattr(self.inner, "is_done", None)
        if ask is None:
            return True
        with self.watch.running(self.device):
            return ask()

    def wait(self) -> None:
        """Finish."""
        with self.watch.running(self.device):
            self.inner.wait()
