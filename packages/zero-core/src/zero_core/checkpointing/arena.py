"""One buffer a device for all that is kept: no fragments, no allocation after the first step.

In: flat elements. Out: copies side by side in the buffer. `Extents` is the pure part: which bytes are free. Backward
frees in the reverse order of forward, so the first gap is the end of what is in use; any other order works as well.

Note [Freed at any time]
The end of a lent tensor's life may come on autograd's thread or in the middle of an allocation. It only leaves a note
in a deque; whoever allocates next reads the notes.

Note [A buffer for each stream]
Memory that is free may be written at once only by the stream that read it last: what it reads was queued before.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

from ..errors import ZeroStateError
from .holders import ALIGN_BYTES, Kept, itself, lend


class Extents:
    """PURE: which parts of a range of bytes are taken.

    Args:
        size: bytes in all.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int | None:
        """Start of the first gap of `nbytes`, rounded up to whole lines; None where there is no such gap."""
        nbytes += -nbytes % ALIGN_BYTES
        start = 0
        for lo, hi in [*self._taken, (self.size, self.size)]:
            if start + nbytes <= lo:
                insort(self._taken, (start, start + nbytes))
                return start
            start = hi
        return None

    def free(self, start: int) -> None:
        """Give back what began at `start`."""
        self._taken = [extent for extent in self._taken if extent[0] != start]

    @property
    def in_use(self) -> int:
        """Bytes taken."""
        return sum(hi - lo for lo, hi in self._taken)


@dataclass
class _Buffer:
    memory: torch.Tensor
    extents: Extents
    returned: deque[int] = field(default_factory=deque)

    def read_notes(self) -> None:
        """See Note [Freed at any time]."""
        while self.returned:
            self.extents.free(self.returned.popleft())


class Arena:
    """Keeps copies in one buffer per device (and stream), allocated when the first input comes.

    Args:
        size: bytes of each buffer.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._buffers: dict[tuple[torch.device, int], _Buffer] = {}

    def keep(self, flat: torch.Tensor, *, name: str, call: int) -> Kept:
        """See `Holder.keep`.

        Raises:
            ZeroStateError: the buffer is full.
        """
        buffer = self._buffer(flat.device)
        nbytes = flat.numel() * flat.element_size()
        start = buffer.extents.take(nbytes)
        if start is None:
            used = buffer.extents.in_use
            raise ZeroStateError(
                f"CheckpointPolicy(contiguous_bytes={self.size}): keeping an input of {name} takes {nbytes} bytes, and "
                f"{used} are in use on {flat.device}; expected at least {used + nbytes}, and as much again for every "
                "later checkpoint of the forward, and for every other forward whose backward is still to come"
            )
        copy = lend(buffer.memory, start, flat.numel(), flat.dtype, partial(buffer.returned.append, start))
        return Kept(copy.copy_(flat), itself)

    def trim(self) -> None:
        """See `Holder.trim`: a buffer in which nothing is kept goes; the next input makes a new one."""
        for buffer in self._buffers.values():
            buffer.read_notes()
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer.extents.in_use}

    def _buffer(self, device: torch.device) -> _Buffer:
        stream = 0  # see Note [A buffer for each stream]
        if device.type != "cpu":
            stream = torch.get_device_module(device).current_stream(device).stream_id
        buffer = self._buffers.get((device, stream))
        if buffer is None:
            memory = torch.empty(self.size, dtype=torch.uint8, device=device)
            buffer = self._buffers[device, stream] = _Buffer(memory, Extents(self.size))
        buffer.read_notes()
        return buffer
