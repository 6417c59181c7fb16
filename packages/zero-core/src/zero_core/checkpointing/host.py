"""Inputs wait in host memory: copied out beside the forward, fetched back one checkpoint ahead of the backward.

In: flat elements on an accelerator (or on the CPU: the same way, without streams). Out: a tensor in a pool of pinned
buffers, bounded and used again. At the bound an input stays on its device: only a backward frees the pool, so a forward
that waited for it would wait for ever.

Note [One side stream]
Every copy of a device, out and back, runs on one stream of its own. A buffer that is free again may be written at
once: the copy which read it was queued before. Both directions in one queue cost nothing, since forward only sends and
backward only fetches.
"""

from __future__ import annotations

import logging
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..errors import ZeroStateError
from .holders import Copies, Kept, lend

PAGE_BYTES = 4096
"""Buffers are whole pages: what pinning works with, and few sizes to find one of again."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arrival:
    """Elements on their way to the device."""

    tensor: torch.Tensor
    lane: _Lane
    event: Any

    def wait(self) -> torch.Tensor:
        """The elements, for the stream of whoever asks."""
        self.lane.join(self.tensor, self.event)
        return self.tensor


class _Lane:
    """The way between one device and the host; see Note [One side stream]."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._backend: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._backend is None else self._backend.Stream(device)

    def send(self, flat: torch.Tensor, host: torch.Tensor) -> None:
        """Copy `flat` to `host`, after what computed it and beside what comes next."""
        if self._stream is not None:
            self._stream.wait_stream(self._backend.current_stream(self.device))
            flat.record_stream(self._stream)
        with self._beside():
            host.copy_(flat, non_blocking=self._stream is not None)

    def fetch(self, host: torch.Tensor) -> _Arrival:
        """Copy `host` to the device, in memory of its own."""
        with self._beside():
            tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            tensor.copy_(host, non_blocking=self._stream is not None)
            event = None if self._stream is None else self._stream.record_event()
        return _Arrival(tensor, self, event)

    def join(self, tensor: torch.Tensor, event: Any) -> None:
        """Make the current stream wait for what was fetched."""
        if self._stream is not None:
            current = self._backend.current_stream(self.device)
            current.wait_event(event)
            tensor.record_stream(current)

    def _beside(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        context: AbstractContextManager[object] = self._backend.stream(self._stream)
        return context


@dataclass
class _Block:
    """One kept input: the buffer it lies in, the checkpoint it belongs to, and what was fetched ahead."""

    buffer: torch.Tensor
    elements: torch.Tensor
    lane: _Lane
    call: int
    arrival: _Arrival | None = None


class HostPool:
    """Keeps inputs in host memory.

    Args:
        limit_bytes: of pinned buffers, in use or waiting for use; None: as many as the inputs need.

    Attributes:
        pooled_bytes: of all buffers now.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.pooled_bytes = 0
        self._device_copies = Copies()
        self._lanes: dict[torch.device, _Lane] = {}
        self._free: dict[tuple[int, torch.device], list[torch.Tensor]] = {}
        self._blocks: dict[int, _Block] = {}
        self._returned: deque[int] = deque()

    def keep(self, flat: torch.Tensor, *, name: str, call: int) -> Kept:
        """See `Holder.keep`; at the bound the copy stays on the device."""
        self._read_notes()
        buffer = self._take(flat.numel() * flat.element_size(), flat.device)
        if buffer is None:
            _logger.debug("host_bytes=%s: %s stays on %s", self.limit_bytes, name, flat.device)
            return self._device_copies.keep(flat, name=name, call=call)
        address = buffer.data_ptr()
        lent = lend(buffer, 0, flat.numel(), flat.dtype, partial(self._returned.append, address))
        lane = self._lane(flat.device)
        # PyTorch knows a pinned buffer, and what is under way in it, by the storage that it allocated.
        elements = buffer[: flat.numel() * flat.element_size()].view(flat.dtype)
        lane.send(flat, elements)
        self._blocks[address] = _Block(buffer, elements, lane, call)
        return Kept(lent, partial(self._fetch, flat.device))

    def trim(self) -> None:
        """See `Holder.trim`."""
        self._read_notes()
        self._free.clear()
        self.pooled_bytes = sum(block.buffer.numel() for block in self._blocks.values())

    def _fetch(self, device: torch.device, kept: torch.Tensor) -> torch.Tensor:
        """The elements on their device; sends for those of the checkpoint before.

        Raises:
            ZeroStateError: what was kept is no longer in the pool, and may not have been in it when it was copied.
        """
        block = self._blocks.get(kept.data_ptr())
        if block is None:  # someone's saved_tensors_hooks had it elsewhere meanwhile
            if device.type != "cpu":
                raise ZeroStateError(
                    "CheckpointPolicy(host=True): other saved_tensors_hooks around the checkpoint copied an input "
                    "out of the host pool, maybe before it had arrived there; leave out the hooks or host=True"
                )
            return kept.clone()
        arrival, block.arrival = block.arrival or block.lane.fetch(block.elements), None
        self._fetch_ahead(block.call)
        return arrival.wait()

    def _fetch_ahead(self, call: int) -> None:
        self._read_notes()
        before = max((block.call for block in self._blocks.values() if block.call < call), default=None)
        for block in self._blocks.values():
            if block.call == before:
                block.arrival = block.arrival or block.lane.fetch(block.elements)
            elif block.call != call:
                block.arrival = None  # a backward that went another way

    def _lane(self, device: torch.device) -> _Lane:
        if device not in self._lanes:
            self._lanes[device] = _Lane(device)
        return self._lanes[device]

    def _take(self, nbytes: int, device: torch.device) -> torch.Tensor | None:
        """A buffer of at least `nbytes`, or None at the bound; one that a device used is free for that alone."""
        nbytes += -nbytes % PAGE_BYTES
        if self._free.get((nbytes, device)):
            return self._free[nbytes, device].pop()
        limit = self.limit_bytes
        if limit is not None and self.pooled_bytes + nbytes > limit:
            self.trim()  # buffers of other sizes make room
        if limit is not None and self.pooled_bytes + nbytes > limit:
            return None
        self.pooled_bytes += nbytes
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type != "cpu")

    def _read_notes(self) -> None:
        """See Note [Freed at any time] in `arena`."""
        while self._returned:
            block = self._blocks.pop(self._returned.popleft())
            self._free.setdefault((block.buffer.numel(), block.lane.device), []).append(block.buffer)
