"""`policy="auto"`: which collectives pay to compress, measured in the first calls of each size.

In: a collective of some kind and size, and both ways to run it. Out: one of the two, in turn while it is measured, then
the faster one, the same on all ranks. What is measured is what training pays: the time until the call returns and the
time in the wait for it, not what passes beside compute.

Note [One decision]
All ranks make the same calls of one kind in the same order, so the n-th call of a size is the same one everywhere.
With a certain call each rank tells the others its times, and with the next call of the same tag, by when every rank
has sent its own, all take the slowest rank's: nobody waits for a rank that has yet to get there.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import zero_core as zero

from .hops import Hop
from .traffic import Entry, Stopwatch

logger = logging.getLogger(__name__)

NUM_ROUNDS = 4
"""How often either way is measured for each tag; the first time either way does not count."""


@dataclass
class _Class:
    """Calls of one kind whose sizes lie between two powers of two."""

    name: str
    times: dict[bool, list[Stopwatch]] = field(default_factory=lambda: {False: [], True: []})
    calls: Counter[int] = field(default_factory=Counter)
    asked: tuple[int, zero.Handle, list[torch.Tensor]] | None = None
    verdict: bool | None = None

    def median_s(self, *, compressed: bool) -> float:
        """Of what was measured so far on this rank."""
        seconds = [watch.seconds for watch in self.times[compressed]]
        return statistics.median(seconds[1:] or seconds or [0.0])


class Trials:
    """Decides for one group.

    Args:
        hop: all ranks.
        device: where small numbers travel from.
    """

    def __init__(self, hop: Hop, device: torch.device) -> None:
        self.hop = hop
        self.device = device
        self._classes: dict[tuple[str, int], _Class] = {}
        self._versions: dict[tuple[str, int, int], tuple[int, bool]] = {}

    def run(
        self,
        entry: Entry,
        nbytes: int,
        tag: int,
        version: int | None,
        ways: Callable[[bool], zero.Handle],
    ) -> zero.Handle:
        """Run one collective.

        Args:
            entry: of its kind; gets the decision as a note.
            nbytes: of the whole buffer.
            tag: its own.
            version: calls of one tag and one version (not None) go one way.
            ways: starts it, compressed or not.
        """
        known = self._classes.setdefault((entry.kind, nbytes.bit_length()), _Class(_range(nbytes)))
        compressed = self._choose(entry, known, (entry.kind, nbytes, tag), version)
        if known.verdict is not None:
            return ways(compressed)
        watch = Stopwatch()
        known.times[compressed].append(watch)
        with watch.running(self.device):
            handle = ways(compressed)
        return _Watched(handle, watch, self.device)

    def _choose(self, entry: Entry, known: _Class, key: tuple[str, int, int], version: int | None) -> bool:
        before = self._versions.get(key)
        if version is not None and before is not None and before[0] == version:
            return before[1]
        if known.verdict is None:
            self._go_on(entry, known, key[2])
        compressed = known.verdict
        if compressed is None:
            compressed = known.calls[key[2]] % 2 == 0
            known.calls[key[2]] += 1
        if version is not None:
            self._versions[key] = version, compressed
        return compressed

    def _go_on(self, entry: Entry, known: _Class, tag: int) -> None:
        """See Note [One decision]."""
        if known.asked is None:
            if known.calls[tag] == 2 * NUM_ROUNDS:
                known.asked = tag, *self._ask(known, tag)
        elif known.asked[0] == tag:
            _, handle, heard = known.asked
            handle.wait()
            plain, compressed = torch.stack(heard).amax(0).tolist()
            known.verdict = compressed < plain
            known.times.clear()
            verdict = "compressed" if known.verdict else "as they are, since compression does not pay"
            note = f"{known.name} travel {verdict} ({plain * 1e3:.2f} ms a call, compressed {compressed * 1e3:.2f} ms)"
            entry.note = "; ".join(filter(None, [entry.note, note]))
            if self.hop.rank == 0:
                logger.info("%s: %s", entry.kind, note)

    def _ask(self, known: _Class, tag: int) -> tuple[zero.Handle, list[torch.Tensor]]:
        seconds = [known.median_s(compressed=False), known.median_s(compressed=True)]
        own = torch.tensor(seconds, dtype=torch.float64, device=self.device).view(torch.uint8)
        heard: list[torch.Tensor] = []

        def hear(parts: Sequence[torch.Tensor]) -> None:
            heard.extend(part.clone().view(torch.float64) for part in parts)

        # A tag of its own: what the unit sends meanwhile must not be taken for it.
        return self.hop.gather(own, tag ^ 0x2AAAAAAA, hear, Entry("decision")), heard


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


def _range(nbytes: int) -> str:
    low = 1 << max(nbytes.bit_length() - 1, 0)
    return f"{low / 1024:g} to {2 * low / 1024:g} KiB"
