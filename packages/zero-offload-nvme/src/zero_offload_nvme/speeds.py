"""How fast this machine's tiers are: measured, in a few seconds.

In: folders, a number of ranks, what a step moves. Out: `forecast.Speeds`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import accel_kernels as ak
import torch

from .blocks import Block
from .errors import OffloadDiskError
from .forecast import Speeds
from .free_bytes import existing
from .nvme_store import NvmeStore
from .tiers import Traffic
from .window import InStore, Operand, Window

LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 20, 32 << 20
"""Of each of four arrays: 16 to 512 MiB in all, since what fits a processor's caches is stepped faster."""
BYTES_STEPPED = 7 * 4
"""That a step of AdamW reads and writes for an element."""
MOST_BURST, MOST_FILES, PAUSE_S = 1 << 30, 256 << 20, 0.05
"""Bytes that a rank moves without a pause, bytes of all ranks' files, and the pause."""
MOST_BLOCK, PIECE = 4 << 20, 1 << 16
"""Elements of a block that passes through a window: at most, and a divisor."""
LINK_BYTES = 256 << 20
REPEATS = 5


def measure_speeds(
    paths: Sequence[str],
    *,
    ranks: int,
    device: str,
    numel: int = MOST_ELEMENTS,
    traffic: Traffic | None = None,
    seconds: float = 2.0,
) -> Speeds:
    """Measure memory, drives and link; nothing else should run meanwhile, so one rank of a machine does it.

    Args:
        paths: folders for an `NvmeStore`, or none.
        ranks: of this machine: as many cores are used as they will use.
        device: type of the device that computes.
        numel: that all these ranks step; of more than 32 Mi elements, so many.
        traffic: of a rank's step, on the drives.
        seconds: for each drive, and half as long again for both directions at once.

    Raises:
        OffloadDiskError: a folder cannot be written, or has less than 64 MiB free.

    Takes up to 512 MiB of memory for the time being, and on a drive at most 256 MiB and a quarter of what is free.
    """
    drives = {os.stat(existing(path)).st_dev: existing(path) for path in paths}
    settings = [_tuned(folder, seconds) for folder in drives.values()]
    threads = min(len(os.sched_getaffinity(0)), ranks * torch.get_num_threads())

    def both(folder: str) -> float:
        if traffic is None:
            return both_speed(folder, ranks, seconds / 2)
        nbytes = 2 * min(traffic.drive_read, traffic.drive_written) // len(drives)
        # A step that only reads or only writes asks for no such speed.
        return both_speed(folder, ranks, seconds / 2, nbytes, traffic.blocks) if nbytes else 0.0

    return Speeds(
        memory=memory_speed(threads, numel),
        drive_read=sum(each.read_gb_per_s for each in settings) or None,
        drive_write=sum(each.write_gb_per_s for each in settings) or None,
        drive_both=sum(both(folder) for folder in drives.values()) or None,
        link=None if device == "cpu" else _link_speed(device),
        settings=min(settings, key=lambda each: each.read_gb_per_s + each.write_gb_per_s, default=None),
    )


def memory_speed(num_threads: int, numel: int) -> float:
    """GB/s of a stream that reads four arrays and writes three of them: AdamW's, by the kernel that will run."""
    numel = min(max(numel, LEAST_ELEMENTS), MOST_ELEMENTS)
    param, grad, mean, square = (torch.rand(numel) for _ in range(4))
    segments = [ak.AdamSegment(start=0, stop=numel, lr=1e-3, step=10)]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        taken = _median(lambda: ak.adam_step(param, grad, mean, square, segments))
    finally:
        torch.set_num_threads(before)
    return BYTES_STEPPED * numel / 1e9 / taken


def both_speed(
    folder: str, ranks: int, seconds: float, nbytes: int = MOST_BURST, num_blocks: int = 64
) -> float:
    """GB/s of a drive under the steps of several ranks: what a step reads and writes, without its arithmetic.

    Args:
        folder: on the drive.
        ranks: as many threads, each with a store of its own.
        seconds: that it may take, but for making the files.
        nbytes: that a rank's step reads and writes. A drive that begins anew is slower than one in full swing, at first
            a step only reads, and at last it only writes; so the speed of short steps is less.
        num_blocks: that a rank's step is cut into.

    Raises:
        OffloadDiskError: the drive fails, or is full.
    """
    if not os.path.isdir(folder):
        raise OffloadDiskError(errno.ENOTDIR, f"preflight: {folder}: cannot be measured: not a folder")
    numel = max(min(nbytes, MOST_BURST) // 8, 1)  # of fp32, each read and written
    block = -(-numel // max(num_blocks, 1))
    room = min(MOST_FILES, shutil.disk_usage(folder).free // 4) // ranks // 4
    block = max(min(-(-block // PIECE) * PIECE, MOST_BLOCK, room // PIECE * PIECE), PIECE)
    starts = range(0, max(min(numel, room) // block, 1) * block, block)
    blocks = [
        Block(0, starts[k % len(starts)], starts[k % len(starts)] + block, (), last=False)
        for k in range(-(-numel // block))
    ]
    meetings = _Meetings(ranks, seconds)

    def at_once(path: str) -> None:
        try:
            with NvmeStore(path) as store:
                store.put("state", torch.rand(starts.stop))
                store.flush()
                window, operand = (
                    Window(block, engine=store.engine),
                    Operand(InStore(store, "state"), torch.float32),
                )
                while not meetings.are_over():
                    with meetings.timed():
                        deque(window.through(blocks, [[operand]]), maxlen=0)
        except threading.BrokenBarrierError:
            return  # another one says why
        except BaseException:
            meetings.abort()  # nobody waits for this one
            raise

    try:
        with (
            tempfile.TemporaryDirectory(prefix=".preflight-", dir=folder) as made,
            ThreadPoolExecutor(ranks) as pool,
        ):
            list(pool.map(at_once, [os.path.join(made, str(rank)) for rank in range(ranks)]))
    except OSError as error:
        raise OffloadDiskError(
            error.errno or errno.EIO, f"preflight: {folder}: cannot be measured: {error}"
        ) from error
    return ranks * len(blocks) * block * 8 / 1e9 / meetings.usual()


class _Meetings:
    """Several threads do something at once, rest, and do it again, for some seconds."""

    def __init__(self, ranks: int, seconds: float) -> None:
        self._seconds = seconds
        self._times: list[float] = []  # it begins, it ends, it begins again
        self._barrier = threading.Barrier(ranks, action=lambda: self._times.append(time.perf_counter()))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """From when the first begins until the last ends."""
        self._barrier.wait()
        yield
        self._barrier.wait()
        time.sleep(PAUSE_S)

    def are_over(self) -> bool:
        """The same for every thread."""
        return bool(self._times) and self._times[-1] - self._times[0] > self._seconds

    def usual(self) -> float:
        """Seconds, the lower quartile: whoever else uses the drive only ever slows it."""
        taken = sorted(b - a for a, b in zip(self._times[::2], self._times[1::2], strict=True))
        return taken[len(taken) // 4]

    def abort(self) -> None:
        """One is missing; the others raise `threading.BrokenBarrierError`."""
        self._barrier.abort()


def _link_speed(device: str) -> float:
    """GB/s of copies between pinned memory and the device, the slower direction."""
    host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)

    def copy(to: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            to.copy_(source, non_blocking=True)
            torch.accelerator.synchronize()

        return run

    return LINK_BYTES / 1e9 / max(_median(copy(host, there)), _median(copy(there, host)))


def _median(call: Callable[[], None]) -> float:
    call()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[REPEATS // 2]


def _tuned(folder: str, seconds: float) -> ak.TransferSettings:
    try:
        return ak.tune(folder, seconds=seconds)
    except ak.TransferError as error:
        raise OffloadDiskError(error.errno, f"preflight: {folder}: cannot be measured: {error}") from error
