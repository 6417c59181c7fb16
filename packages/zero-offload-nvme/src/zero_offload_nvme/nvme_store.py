"""Drives as a store: each tensor a range of a file, moved past the page cache by `accel_kernels.TransferEngine`.

In: flat tensors under names. Out: the same, read into memory that the caller brings. `drive_files` says where they are,
`drive_transfers` what of them is on its way.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import accel_kernels as ak
import torch
from zero_core import Handle

from .drive_files import DriveFiles, Place
from .drive_transfers import ReadAhead, Writes, Writing
from .errors import OffloadConfigError
from .host_store import DONE, Done, copy_later

logger = logging.getLogger(__name__)

# Note [Views of a drive]
# `view` maps a tensor's range of the file. The kernel keeps such a map and reads and writes past the page cache agreed,
# one after the other: before a direct read it writes back what was changed through the map, and after a direct write
# it drops the pages. So whoever is in no hurry (checkpoints, `get_full`, a load) uses the tensor like any other.


class _Reading:
    """A read into memory, then a copy to where the values are wanted."""

    def __init__(
        self,
        transfer: ak.Transfer,
        source: torch.Tensor | None,
        out: torch.Tensor,
        done: Callable[[Handle], None] | None = None,
    ) -> None:
        self._transfer, self._source, self._out, self._done = transfer, source, out, done

    def wait(self) -> None:
        self._transfer.wait()
        if self._source is not None:
            copied = copy_later(self._out, self._source)  # what a device then does comes after it
            self._source = None
            if self._done is not None:
                self._done(copied)

    def is_done(self) -> bool:
        return self._transfer.is_done()


P = ParamSpec("P")
T = TypeVar("T")


def _one_at_a_time(method: Callable[Concatenate[NvmeStore, P], T]) -> Callable[Concatenate[NvmeStore, P], T]:
    """Several threads may use a store; their bytes travel side by side all the same."""

    @wraps(method)
    def call(self: NvmeStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class NvmeStore:
    """Keeps flat tensors on drives; a `zero_core.ShardStore`.

    Args:
        path: a directory, or several on as many drives: tensors go to the one with the least on it.
        limit_bytes: more than that is never set aside; None: what the file systems have free.
        cache_bytes: of tensors that `prefetch` may bring to memory ahead of their `fetch`, and of values on their way
            to the drive, for each.
        engine: moves the bytes; None makes one.
        tune_s: seconds to measure the (first) drive for, so that the engine has the block size and queue depth which
            are fastest there; None: 1 MiB, and 32 blocks.
        pin: lock the pages of what `prefetch` reads, so that copies to a device run beside compute; None: where there
            is a device.

    Raises:
        OffloadDiskError: a directory cannot be written, or a file system is full; names path, bytes wanted and free.
            Nothing has changed then.
        accel_kernels.TransferError: bytes did not get through; names file, offset and bytes. A write that failed is
            told by whatever next asks for its range, again and again until the range is put anew or released.

    Bytes per rank: on the drives, what is put, in pages; in memory `cache_bytes` for what is read ahead, as much again
    for what is on its way, and what callers bring.
    """

    in_memory = False

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        limit_bytes: int | None = None,
        cache_bytes: int = 256 << 20,
        engine: ak.TransferEngine | None = None,
        tune_s: float | None = None,
        pin: bool | None = None,
    ) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        if not paths:
            raise OffloadConfigError("NvmeStore(path=...): expected a directory, or several, got none")
        if engine is not None and tune_s is not None:
            raise OffloadConfigError(
                "NvmeStore(engine=..., tune_s=...): an engine that is given is not tuned; leave one of the two out"
            )
        self.cache_bytes = cache_bytes
        self._own_engine = engine is None
        self.engine = engine or _engine_for(os.fspath(paths[0]), tune_s)
        self._lock = threading.RLock()
        self._writes = Writes(cache_bytes)
        self.pin = torch.accelerator.is_available() if pin is None else pin
        self._ahead = ReadAhead(self.engine, cache_bytes, pin=self.pin)
        try:
            self._files = DriveFiles(self.engine, [os.fspath(each) for each in paths], limit_bytes)
        except BaseException:
            if self._own_engine:
                self.engine.close()
            raise

    @property
    def limit_bytes(self) -> int | None:
        """As given."""
        return self._files.limit_bytes

    @property
    def used_bytes(self) -> int:
        """On the drives, in pages."""
        return self._files.used_bytes

    @_one_at_a_time
    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        """Make a tensor of zeros; the file systems set its bytes aside now."""
        if not self._files.add(name, numel, dtype).is_fresh:
            self.view(name).zero_()

    @_one_at_a_time
    def put(self, name: str, values: torch.Tensor, start: int = 0) -> ak.Transfer | Done:
        """See `zero_core.ShardStore.put`."""
        if name not in self._files and not start:
            self._files.add(name, values.numel(), values.dtype)
        place = self._files[name]
        place.check(name, values, start, same_dtype=True)
        self.forget(name)
        if not values.numel():
            return DONE
        stop = start + values.numel()
        # The engine ends writes in any order; what is wholly replaced need not have arrived.
        self._writes.wait(name, start, stop, replaced=True)
        values = values.detach().cpu().contiguous()
        transfer = self.engine.write(place.drive.file, place.offset_of(start), values)
        self._writes.add(name, Writing(start, stop, values.dtype, int(values.storage_offset()), transfer))
        return transfer

    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> _Reading | Done:
        """See `zero_core.ShardStore.fetch`; what is on its way to the drive is copied from where it comes from."""
        return DONE if self._copied(name, out, start) else self._read(name, out, start)

    def _copied(self, name: str, out: torch.Tensor, start: int) -> bool:
        """Whether `out` was filled from a write under way; if not, no write of the range is under way any more."""
        stop = start + out.numel()
        with self._lock:
            writes = self._writes.touching(name, start, stop)
        for each in writes:
            if each.start <= start and stop <= each.stop and each.copy_to(out, start):
                return True
            with suppress(ak.TransferError):  # told by `_read`
                each.transfer.wait()  # not in the lock: others may use the store
        return False

    @_one_at_a_time
    def _read(self, name: str, out: torch.Tensor, start: int) -> _Reading | Done:
        place = self._files[name]
        place.check(name, out, start)
        if not out.numel():
            return DONE
        self._writes.wait(name, start, start + out.numel())
        if name in self._ahead and start == 0 and out.numel() == place.numel:
            transfer, memory = self._ahead.take(name)
            values = memory[: place.nbytes].view(place.dtype)
            return _Reading(transfer, values, out, partial(self._ahead.give, memory))
        file, offset = place.drive.file, place.offset_of(start)
        if out.is_cpu and out.is_contiguous() and out.dtype == place.dtype:
            return _Reading(self.engine.read(file, offset, out.detach()), None, out)
        memory = ak.aligned_empty(out.numel() * place.dtype.itemsize)
        return _Reading(self.engine.read(file, offset, memory), memory.view(place.dtype), out)

    @_one_at_a_time
    def prefetch(self, name: str) -> None:
        """See `zero_core.ShardStore.prefetch`; nothing where the cache is full."""
        if name not in self._ahead:
            self._ahead.begin(name, self._settled(name))

    @_one_at_a_time
    def forget(self, name: str) -> None:
        """See `zero_core.ShardStore.forget`."""
        self._ahead.forget(name)

    @_one_at_a_time
    def view(self, name: str) -> torch.Tensor:
        """A map of the file, see Note [Views of a drive]; it outlives the store, and the file with it.

        Between a `prefetch` and its `fetch`, write to a map after `forget`: what is in memory would not show it.
        """
        self.forget(name)
        return self._settled(name).view()

    @_one_at_a_time
    def rewritten(self, name: str) -> None:
        """Its view has been wholly written: what could not be written before matters no more."""
        if name in self._files:
            self.forget(name)
            self._writes.wait(name, 0, self._files[name].numel, replaced=True)

    @_one_at_a_time
    def release(self, name: str) -> None:
        """Keep it no longer; its range serves the next one of its size."""
        if name in self._files:
            self.forget(name)
            self._writes.wait(name, 0, self._files[name].numel, replaced=True)
            self._files.remove(name)

    @_one_at_a_time
    def swap(self, name: str, other: str) -> None:
        """Have each of two tensors under the other's name from now on; nothing is moved, views stay what they are."""
        self._files.swap(name, other)
        for each in (name, other):
            self.forget(each)
        self._writes.swap(name, other)

    @_one_at_a_time
    def flush(self) -> None:
        """Return when all that was put is in the files.

        Raises:
            accel_kernels.TransferError: some of it is not.
        """
        for name in self._writes.names():
            self._settled(name)

    @_one_at_a_time
    def close(self) -> None:
        """Let go of files and engine; views stay what they are."""
        for name, place in self._files.items():  # nobody will read it
            self._writes.wait(name, 0, place.numel, replaced=True)
        self._ahead.clear()
        self._files.close()
        if self._own_engine:
            self.engine.close()

    def __enter__(self) -> NvmeStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _settled(self, name: str) -> Place:
        """Where a tensor is, once nothing of it is being written."""
        place = self._files[name]
        self._writes.wait(name, 0, place.numel)
        return place


def _engine_for(folder: str, tune_s: float | None) -> ak.TransferEngine:
    """An engine with what is fastest in a folder, as measured in so many seconds; None: with what it has by itself."""
    if tune_s is None:
        return ak.TransferEngine()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return ak.TransferEngine()  # who opens a file there says why that cannot be
    try:
        found = ak.tune(folder, seconds=tune_s).arguments()
    except ak.TransferError as error:  # read-only, or too full to measure, which is no reason not to be used
        logger.warning("%s: not tuned: %s", folder, error)
        found = {}
    return ak.TransferEngine(**found)  # type: ignore[arg-type]
