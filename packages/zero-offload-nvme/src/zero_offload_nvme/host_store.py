"""Host memory as a store: what rests there is computed on where it lies.

In: flat tensors of any device under names. Out: the same, as CPU tensors (pinned beside a device). Memory that one
name gives back serves the next of its size.
"""

from __future__ import annotations

from collections import defaultdict
from copy import copy

import torch

from .errors import OffloadMemoryError, OffloadStateError
from .maps import host_empty


class Done:
    """What was asked for is there."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def is_done(self) -> bool:
        """Always."""
        return True


DONE = Done()


class Copying:
    """A copy between host and device that the current stream makes: a `Handle`, for the host to wait for."""

    def __init__(self, device: torch.device, keep: torch.Tensor) -> None:
        self._event = torch.Event(device)
        self._event.record()
        self._keep: torch.Tensor | None = keep

    def wait(self) -> None:
        """Return when both memories may be touched."""
        self._event.synchronize()
        self._keep = None

    def is_done(self) -> bool:
        """Whether they may be now."""
        return bool(self._event.query())

    def without_source(self) -> Copying:
        """The same copy, for who keeps it long."""
        other = copy(self)
        other._keep = None
        return other

    def comes_first(self) -> None:
        """Before what the current stream is given from now on; the host goes on."""
        self._event.wait()


class ComingUp:
    """A copy to a device: a `Handle`, for the device to wait for."""

    def __init__(self, copying: Copying) -> None:
        self._copying = copying

    def wait(self) -> None:
        """What the current stream is given from now on may use the values; the host goes on."""
        self._copying.comes_first()

    def is_done(self) -> bool:
        """The host need not wait."""
        return True


class HostStore:
    """Keeps flat tensors in host memory; a `zero_core.ShardStore`.

    Args:
        limit_bytes: more than that is refused; None: what the system gives.
        pin: lock the pages, so that copies from and to a device run beside compute; None: where there is a device.

    Raises:
        OffloadMemoryError: from `put`: the limit, or the system's memory, is used up; nothing has changed then.
    """

    in_memory = True

    def __init__(self, *, limit_bytes: int | None = None, pin: bool | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.pin = torch.accelerator.is_available() if pin is None else pin
        self.used_bytes = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._last: dict[str, Copying] = {}  # of the copies between a device and a tensor
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._closed = False

    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        """Make a tensor of zeros."""
        self._make(name, numel, dtype).zero_()

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> Done | Copying:
        """See `zero_core.ShardStore.put`."""
        if name not in self._tensors and not start:
            self._make(name, values.numel(), values.dtype)
        kept = self.at(name)
        if not 0 <= start <= kept.numel() - values.numel() or values.dtype != kept.dtype:
            raise OffloadStateError(
                f"HostStore: {name!r} has {kept.numel()} elements of {kept.dtype}; got {values.numel()} of "
                f"{values.dtype} for element {start} on"
            )
        return self._copy(name, kept[start : start + values.numel()], values.detach())

    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> Done | ComingUp:
        """See `zero_core.ShardStore.fetch`; a device's copy begins at once, and the host need not wait for it."""
        copied = self._copy(name, out, self.at(name)[start : start + out.numel()])
        return ComingUp(copied) if isinstance(copied, Copying) else copied

    def prefetch(self, name: str) -> None:
        """It is here."""

    def forget(self, name: str) -> None:
        """It stays here; whoever has a `view` may write to it afterwards."""
        last = self._last.get(name)
        if last is not None:
            last.wait()
            if self._last.get(name) is last:  # no other has begun meanwhile
                del self._last[name]

    def view(self, name: str) -> torch.Tensor:
        """The tensor itself, once no device copies from or to it."""
        self.forget(name)
        return self.at(name)

    def at(self, name: str) -> torch.Tensor:
        """The tensor itself; a device may be copying from or to it."""
        self._check_open(name)
        if name not in self._tensors:
            raise OffloadStateError(f"HostStore: nothing is kept under {name!r}")
        return self._tensors[name]

    def release(self, name: str) -> None:
        """Keep it no longer; its memory serves the next one of its size."""
        self.forget(name)
        tensor = self._tensors.pop(name, None)
        if tensor is not None:
            raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.used_bytes -= raw.numel()
            self._free[raw.numel()].append(raw)

    def swap(self, name: str, other: str) -> None:
        """Have each of two tensors under the other's name from now on; views stay what they are."""
        first, second = self.view(name), self.view(other)
        self._tensors[name], self._tensors[other] = second, first

    def flush(self) -> None:
        """Nothing is on its way that a `view` would miss."""
        if self.pin:
            torch.accelerator.synchronize()

    def close(self) -> None:
        """Let go of everything; views stay what they are."""
        self._tensors.clear()
        self._free.clear()
        self.used_bytes = 0
        self._closed = True

    def __enter__(self) -> HostStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _copy(self, name: str, to: torch.Tensor, source: torch.Tensor) -> Done | Copying:
        """Copy from or to the tensor of this name, after the copy before."""
        last = self._last.get(name)
        if to.is_cpu and source.is_cpu:
            self.forget(name)
        elif last is not None:
            last.comes_first()
        copied = copy_later(to, source)
        if isinstance(copied, Copying):
            self._last[name] = copied.without_source()
        return copied

    def _check_open(self, name: str) -> None:
        if self._closed:
            raise OffloadStateError(f"HostStore: {name!r}: the store is closed; make a new one")

    def _make(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        self._check_open(name)
        if name in self._tensors:
            raise OffloadStateError(f"HostStore: {name!r} is there already; release it first")
        nbytes = numel * dtype.itemsize
        if self.limit_bytes is not None and self.used_bytes + nbytes > self.limit_bytes:
            raise OffloadMemoryError(
                f"HostStore: {name!r} needs {nbytes} bytes of host memory, and {self.limit_bytes - self.used_bytes} of "
                f"{self.limit_bytes} are free; raise limit_bytes, or use NvmeStore"
            )
        found = self._free[nbytes]
        raw = found.pop() if found else self._allocate(name, nbytes)
        self.used_bytes += nbytes
        self._tensors[name] = raw.view(dtype)
        return self._tensors[name]

    def _allocate(self, name: str, nbytes: int) -> torch.Tensor:
        spare = sum(size * len(tensors) for size, tensors in self._free.items())
        if self.limit_bytes is not None and self.used_bytes + spare + nbytes > self.limit_bytes:
            self._free.clear()  # memory of other sizes counts too
        return host_empty(nbytes, f"HostStore: {name!r}", pin=self.pin)


def copy_later(to: torch.Tensor, source: torch.Tensor) -> Done | Copying:
    """Copy; between host and device beside what the host does."""
    to.copy_(source, non_blocking=True)
    device = source.device if source.device.type != "cpu" else to.device
    return DONE if device.type == "cpu" else Copying(device, source)
