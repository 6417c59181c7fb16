"""Copies between a device and the host that go on beside the host's work.

In: pairs of tensors. Out: `Pending`s, to be waited for before what was copied is touched. `DeviceCopies` has two
streams, one a direction, so that a gradient comes while parameters go.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .maps import pinned_empty


class Pending(Protocol):
    """Copies under way."""

    def wait(self) -> None:
        """Return when they are done."""


class Copies(Protocol):
    """How bytes move; `device_steps` asks for no more than this."""

    def begin(self) -> None:
        """The work queued on the device so far comes before every copy from now on."""

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Pending:
        """Queue copies (host, device) <- ."""

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> Pending:
        """Queue copies (device, host) <- ."""

    def end(self) -> None:
        """Every copy so far comes before the work queued on the device from now on."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory, uint8, that the device can copy from and to by itself."""


class DeviceCopies:
    """Copies by a device's own streams, through pinned memory.

    Args:
        device: a CUDA device (or another that has streams and events in `torch.get_device_module`).
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._down, self._up = self._module.Stream(device), self._module.Stream(device)

    def begin(self) -> None:
        """See `Copies`."""
        now = self._module.current_stream(self._device)
        self._down.wait_stream(now)
        self._up.wait_stream(now)

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Pending:
        """See `Copies`."""
        return self._queue(self._down, pairs)

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> Pending:
        """See `Copies`."""
        return self._queue(self._up, pairs)

    def end(self) -> None:
        """See `Copies`."""
        self._module.current_stream(self._device).wait_stream(self._up)

    def buffer(self, num_bytes: int) -> Tensor:
        """See `Copies`."""
        return pinned_empty(num_bytes, torch.uint8)

    def _queue(self, stream: Any, pairs: list[tuple[Tensor, Tensor]]) -> Pending:
        with self._module.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = self._module.Event()
            event.record(stream)
        return _Recorded(event)


class _Recorded:
    """An event of a device."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        """See `Pending`."""
        self._event.synchronize()
