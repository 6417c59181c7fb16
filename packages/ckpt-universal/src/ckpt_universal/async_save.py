"""`AsyncSaver`: the training step waits for a copy to host memory; writing goes on beside it.

In: a state tree, as for `save`. At once: what this rank is to write is copied into one of two host buffers. Later, on a
thread: `save.write_step`, over a process group of its own. An error there is raised by the next call, and logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, takewhile
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks
from .save import Agreed, SavePolicy, Taken, Target, take_apart, write_step
from .writer import CHUNK_ALIGN, Piece

log = logging.getLogger(__name__)


class HostBuffer:
    """Host memory that keeps its pages from one save to the next; pinned where values come from a device."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[torch.dtype, torch.Size]] = []
        self._rooms: list[torch.Tensor] = []

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces, as they are now."""
        devices = {piece.values.device for piece in pieces if piece.values.device.type != "cpu"}
        layout = [(piece.values.dtype, piece.values.shape) for piece in pieces]
        if layout != self._layout or (devices and not self._bytes.is_pinned()):
            self._lay_out(layout, pin=bool(devices))
        for room, piece in zip(self._rooms, pieces, strict=True):
            room.copy_(piece.values, non_blocking=True)
        for device in devices:
            torch.get_device_module(device).current_stream(device).synchronize()
        return [Piece(piece.name, room) for piece, room in zip(pieces, self._rooms, strict=True)]

    def _lay_out(self, layout: list[tuple[torch.dtype, torch.Size]], *, pin: bool) -> None:
        """Have room for tensors of these dtypes and shapes, one after another."""
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in layout]
        starts = [0, *accumulate(-(-size // CHUNK_ALIGN) * CHUNK_ALIGN for size in sizes)]
        if self._bytes.numel() < starts[-1] or (pin and not self._bytes.is_pinned()):
            self._bytes = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
        self._layout = layout
        self._rooms = [
            self._bytes[start : start + size].view(dtype).view(shape)
            for start, size, (dtype, shape) in zip(starts, sizes, layout, strict=False)
        ]


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
        self._agreed: Agreed | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ckpt-save")

    def save(self, state: Mapping[str, Any], *, step: int, name: str | None = None) -> None:
        """Begin to save a state tree, as `ckpt_universal.save` does; returns when it may change again.

        Where two saves are still being written, it waits for the older one first.

        Raises:
            CheckpointError: An earlier save has failed (this one has not begun); or as for `save`.
        """
        target = Target.of(self._path, step, name)
        while len(self._jobs) >= len(self._buffers):
            self._finish_first()
        taken, said = self._ranks.share(
            "save: taking the state apart", lambda: take_apart(state), self._report
        )
        # Ranks see the end of a save at different times; they raise together, since it failed on all of them.
        for _ in range(max(num_done for num_done, _ in said)):
            self._finish_first()
        agreed = self._agreed
        if agreed is None or not all(knows_layout for _, knows_layout in said):
            told = self._ranks.gather_bytes(taken.told, "save")
            self._agreed = agreed = Agreed.of(told, self._ranks.rank, self.policy.chunk_bytes)
        buffer = self._buffers[self._num_saves % len(self._buffers)]
        pieces = buffer.copy(agreed.pieces(taken))
        self._num_saves += 1
        self._jobs.append(self._thread.submit(self._write, target, pieces, taken.values, agreed))

    def _report(self, taken: Taken) -> tuple[int, bool]:
        """How many saves have ended, and whether the layout is that of the last one."""
        num_done = sum(1 for _ in takewhile(Future.done, self._jobs))
        return num_done, self._agreed is not None and self._agreed.told == taken.told

    def _write(self, target: Target, pieces: Sequence[Piece], values: bytes, agreed: Agreed) -> str:
        try:
            path = write_step(target, pieces, values, agreed, self._beside, self.policy)
        except BaseException:
            log.exception("step %d was not saved", target.step)
            raise
        self.committed = path
        return path

    def _finish_first(self) -> None:
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
        try:
            self.wait()
        finally:
            self._thread.shutdown()
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
