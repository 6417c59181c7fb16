"""What an accelerator does beside compute, on a stream of its own.

In: work that is queued inside `Beside.compute`. Out: a handle; compute waits for none of it before that is waited for.
On the CPU there are no streams: work is done where it is queued. Used by `hierarchy` and `turns`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Beside:
    """One stream for each accelerator that is met."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def compute(self, device: torch.device) -> Iterator[Queued]:
        """Queue what the body gives `device` beside compute: after all that has been queued so far.

        Tensors that it uses must live until the handle is done. If the body fails, compute comes after what it queued.
        """
        queued = Queued(device)
        if device.type == "cpu":
            yield queued
            return
        module = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = module.Stream(device)
        stream, now = self._streams[device], module.current_stream(device)
        stream.wait_stream(now)
        try:
            with module.stream(stream):
                yield queued
        except BaseException:
            now.wait_stream(stream)
            raise
        queued.event = stream.record_event()


class Queued:
    """What has been queued beside compute: a `Handle`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.event: Any = None

    def wait(self) -> None:
        """Have compute come after it; the host goes on."""
        if self.event is not None:
            torch.get_device_module(self._device).current_stream(self._device).wait_event(self.event)
