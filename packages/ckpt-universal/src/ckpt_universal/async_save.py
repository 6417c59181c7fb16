"""`AsyncSaver`: the training step waits for a copy to host memory; writing goes on beside it.

In: a state tree, as for `save`. At once: what this rank is to write is copied into one of two host buffers. Later, on a
thread: `save.Writing`, over a process group of its own. An error there is raised by the next call, and logged.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import accumulate, takewhile
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .buffers import aligned_memory
from .errors import CheckpointError
from .holdings import Agreed, Layout, Taken, take_apart
from .ranks import Ranks
from .save import SavePolicy, Target, Writing, check_alike
from .tree import Boxes
from .writer import CHUNK_ALIGN, Piece

log = logging.getLogger(__name__)
T = TypeVar("T")


class HostBuffer:
    """Host memory that keeps its pages from one save to the next; pinned where values come from a device."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._agreed: Agreed | None = None
        self._copies: list[Piece] = []
        self._addresses: list[int] = []

    def copy(self, pieces: Sequence[Piece], agreed: Agreed) -> list[Piece]:
        """The pieces, as they are now; the same `agreed` means pieces of the same dtypes and shapes."""
        if agreed is not self._agreed:
            self._lay_out(pieces)
            self._agreed = agreed
        devices = set()
        for copy, address, piece in zip(self._copies, self._addresses, pieces, strict=True):
            values = piece.values
            if values.is_cpu and values.is_contiguous() and not (values.is_conj() or values.is_neg()):
                # The C library's copy goes round the caches, and so takes a tenth less than torch's.
                ctypes.memmove(address, values.data_ptr(), values.nbytes)
            else:
                copy.values.copy_(values, non_blocking=True)
                devices.add(values.device)
        for device in devices:
            if device.type != "cpu":
                torch.get_device_module(device).current_stream(device).synchronize()
        return self._copies

    def _lay_out(self, pieces: Sequence[Piece]) -> None:
        """Have room for pieces of these dtypes and shapes, one after another."""
        tensors = [piece.values for piece in pieces]
        starts = [0, *accumulate(-(-each.nbytes // CHUNK_ALIGN) * CHUNK_ALIGN for each in tensors)]
        pin = any(not each.is_cpu for each in tensors)
        if self._bytes.numel() < starts[-1] or (pin and not self._bytes.is_pinned()):
            self._bytes = (
                torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
                if pin
                else torch.frombuffer(aligned_memory(starts[-1]), dtype=torch.uint8)
            )
        self._copies = [
            Piece(piece.name, self._bytes[start : start + each.nbytes].view(each.dtype).view(each.shape))
            for start, each, piece in zip(starts, tensors, pieces, strict=False)
        ]
        self._addresses = [copy.values.data_ptr() for copy in self._copies]


def _finish_at_exit(saver: AsyncSaver) -> None:
    """Have a saver that nobody closes finish what it has begun: after this, threads can begin nothing any more."""
    known = weakref.ref(saver)

    def finish() -> None:
        left = known()
        if left is not None and left._jobs and not left._closed:
            log.warning("an AsyncSaver was not closed; the program waits for its last saves")
            left.wait()

    register = getattr(threading, "_register_atexit", None)  # `atexit` is too late
    if register is not None:
        register(finish)


def _attempt(act: Callable[[], T]) -> Future[T]:
    """What an act returned, or raised."""
    done: Future[T] = Future()
    try:
        done.set_result(act())
    except BaseException as error:
        done.set_exception(error)
    return done


class AsyncSaver:
    """Saves steps while training goes on; every rank makes one, and calls it alike.

    Args:
        path: The directory of all steps, or a URL for fsspec.
        group: The ranks; None: all, or this process alone where torch.distributed is not initialised.
        policy: How.

    Attributes:
        committed: path of the step committed last, or None.

    Bytes per rank: two copies of what it writes, in host memory, beside those of `save`. The first two saves wait for
    the system to find these pages, too.

    Example:
        >>> with AsyncSaver("checkpoints") as saver:  # doctest: +SKIP
        ...     for step in range(1000):
        ...         train(step)
        ...         if step % 100 == 0:
        ...             saver.save({"model": model, "optimizer": optimizer}, step=step)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        group: dist.ProcessGroup | None = None,
        policy: SavePolicy | None = None,
    ) -> None:
        self.policy = policy or SavePolicy()
        self.committed: str | None = None
        self._path = path
        # One for this thread and one for the other: what they say needs no common order.
        self._ranks = Ranks(group, own=True, timeout_s=self.policy.timeout_s)
        self._beside = Ranks(group, own=True, timeout_s=self.policy.timeout_s)
        self._buffers = (HostBuffer(), HostBuffer())
        self._jobs: list[Future[str]] = []
        self._num_saves = 0
        self._closed = False
        self._agreed: Agreed | None = None
        self._layout: Layout = {}  # of what was agreed
        self._boxes: Boxes = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckpt-save")
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="ckpt-ask")
        _finish_at_exit(self)

    def save(self, state: Mapping[str, Any], *, step: int, name: str | None = None) -> None:
        """Begin to save a state tree, as `ckpt_universal.save` does; returns when it may change again.

        Where two saves are still being written, it waits for the older one first.

        Raises:
            CheckpointError: An earlier save has failed (this one has not begun); or as for `save`.
        """
        if self._closed:
            raise CheckpointError("AsyncSaver.save: the saver is closed; make a new one")
        while len(self._jobs) >= len(self._buffers):
            self._finish_first()
        buffer = self._buffers[self._num_saves % len(self._buffers)]
        targeting = _attempt(lambda: Target.of(self._path, step, name))
        taking = _attempt(lambda: (targeting.result(), take_apart(state, self._boxes))[1])
        num_done, as_before = sum(1 for _ in takewhile(Future.done, self._jobs)), self._is_as_before(taking)
        asked = self._asking.submit(
            self._ranks.share,
            "save: taking the state apart",
            taking.result,
            lambda _: (num_done, as_before, targeting.result().known),
        )
        # Meanwhile this rank copies: mostly, all of them hold what they held last time.
        copying = self._copying(taking.result(), buffer) if as_before else None
        taken, said = asked.result()
        target = targeting.result()
        # Ranks see the end of a save at different times; they raise together, since it failed on all of them.
        for _ in range(max(num_done for num_done, _, _ in said)):
            self._finish_first()
        check_alike([known for _, _, known in said])
        if copying is None or not all(as_before for _, as_before, _ in said):
            told = self._ranks.gather_bytes(taken.told, "save")
            self._agreed = Agreed.of(told, self._ranks.rank, self.policy.chunk_bytes)
            self._layout = taken.layout
            copying = self._copying(taken, buffer)
        self._num_saves += 1
        assert self._agreed is not None
        self._jobs.append(self._thread.submit(self._write, target, copying, taken.values, self._agreed))
        copying.result()

    def _is_as_before(self, taking: Future[Taken]) -> bool:
        """Whether what was taken apart has the layout of the last save."""
        return (
            self._agreed is not None and taking.exception() is None and self._layout == taking.result().layout
        )

    def _copying(self, taken: Taken, buffer: HostBuffer) -> Future[list[Piece]]:
        """What this rank is to write, in host memory; done, or failed, which the other ranks hear of."""
        agreed = self._agreed
        assert agreed is not None
        return _attempt(lambda: buffer.copy(agreed.pieces(taken), agreed))

    def _write(self, target: Target, copying: Future[list[Piece]], values: bytes, agreed: Agreed) -> str:
        try:
            with Writing(target, self._beside) as writing:

                def begin() -> tuple[list[Piece], str]:
                    return copying.result(), writing.begin()

                (pieces, _), said = self._beside.share("save", begin, lambda begun: (begun[1], values))
                (token, *_), trees = zip(*said, strict=True)
                path = writing.write(token, pieces, trees, agreed, self.policy)
        except BaseException:
            log.exception("step %d was not saved", target.step)
            raise
        self.committed = path
        return path

    def _finish_first(self) -> None:
        wait_for(self._jobs[:1])  # an interruption leaves it there: its buffer is in use
        self._jobs.pop(0).result()

    def wait(self) -> str | None:
        """Return when everything begun is committed; the path of the last step.

        Raises:
            CheckpointError: A save has failed; the first one that did.
        """
        failure: BaseException | None = None
        while self._jobs:
            try:
                self._finish_first()
            except Exception as error:  # noqa: PERF203 - the others are waited for all the same
                failure = failure or error
        if failure is not None:
            raise failure
        return self.committed

    def close(self) -> None:
        """Wait, and end the thread; as `wait`."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._asking.shutdown()
            self._ranks.close()
            self._beside.close()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            self.close()
        except Exception:  # the error of the block says more
            log.exception("a save failed, too")
