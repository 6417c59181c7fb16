"""Where the time of a training step goes: sums of named spans, read and reset at each report.

In: spans around forward, backward and step. Out: milliseconds by name. Off, it costs a dictionary lookup.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums the wall-clock time of named spans.

    Args:
        enabled: Whether spans are timed; the device is synchronised at both ends of each.
        device: Where the work runs.
    """

    def __init__(self, *, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self.device = device
        self._total_s: dict[str, float] = {}
        self._last_report_s = time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        if not self.enabled:
            yield
            return
        self._synchronize()
        start_s = time.perf_counter()
        yield
        self._synchronize()
        self._total_s[name] = self._total_s.get(name, 0.0) + time.perf_counter() - start_s

    def since_last_report(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and milliseconds of each span since then."""
        self._synchronize()
        now_s = time.perf_counter()
        elapsed_s, self._last_report_s = now_s - self._last_report_s, now_s
        spans = {name: 1e3 * total for name, total in self._total_s.items()}
        self._total_s.clear()
        return elapsed_s, spans

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_bytes(device: torch.device) -> int:
    """Most memory that was ever in use: of the device, or, on a CPU, of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
