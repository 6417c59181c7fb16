"""How fast this machine's tiers are: measured, in a few seconds.

In: folders, a number of ranks, the size of a step. Out: `forecast.Speeds`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import accel_kernels as ak
import torch

from .errors import OffloadDiskError
from .forecast import Speeds
from .free_bytes import existing

LEAST_ELEMENTS, MOST_ELEMENTS = 1 << 20, 32 << 20
"""Of each of four arrays: 16 to 512 MiB in all, since what fits a processor's caches is stepped faster."""
BYTES_STEPPED = 7 * 4
"""That a step of AdamW reads and writes for an element."""
BLOCK_BYTES, NUM_BLOCKS = 4 << 20, 12
"""Of transfers in both directions at once, as a `Window` has them."""
LINK_BYTES = 256 << 20
REPEATS = 5


def measure_speeds(
    paths: Sequence[str], *, ranks: int, device: str, numel: int = MOST_ELEMENTS, seconds: float = 2.0
) -> Speeds:
    """Measure memory, drives and link; nothing else should run meanwhile, so one rank of a machine does it.

    Args:
        paths: folders for an `NvmeStore`, or none.
        ranks: of this machine: as many cores are used as they will use.
        device: type of the device that computes.
        numel: that all these ranks step; of more than 32 Mi elements, so many.
        seconds: for each drive, and half as long again for both directions at once.

    Raises:
        OffloadDiskError: a folder cannot be written, or has less than 64 MiB free.

    Takes up to 512 MiB of memory for the time being, and on a drive at most 256 MiB and a quarter of what is free.
    """
    drives = {os.stat(existing(path)).st_dev: existing(path) for path in paths}
    settings = [_tuned(folder, seconds) for folder in drives.values()]
    threads = min(len(os.sched_getaffinity(0)), ranks * torch.get_num_threads())
    return Speeds(
        memory=memory_speed(threads, numel),
        drive_read=sum(each.read_gb_per_s for each in settings) or None,
        drive_write=sum(each.write_gb_per_s for each in settings) or None,
        drive_both=sum(both_speed(folder, ranks, seconds / 2) for folder in drives.values()) or None,
        link=None if device == "cpu" else _link_speed(device),
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


def both_speed(folder: str, ranks: int, seconds: float) -> float:
    """GB/s of a drive that several ranks read and write at once, each a file of its own.

    Raises:
        OffloadDiskError: the drive fails, or is full.
    """
    start = threading.Barrier(ranks)

    def move(path: str) -> tuple[int, float]:
        free = min(256 << 20, shutil.disk_usage(folder).free // 4)
        nbytes = max(free // ranks // BLOCK_BYTES, 2) * BLOCK_BYTES
        with ak.TransferEngine() as engine, engine.open(path, nbytes=nbytes) as file:
            blocks = [ak.aligned_empty(BLOCK_BYTES).random_() for _ in range(NUM_BLOCKS)]
            offsets = range(0, nbytes, BLOCK_BYTES)
            for transfer in [engine.write(file, at, blocks[0]) for at in offsets]:
                transfer.wait()
            start.wait()
            began, count, moving = time.perf_counter(), 0, deque[ak.Transfer]()
            while time.perf_counter() - began < seconds:
                if len(moving) == NUM_BLOCKS:
                    moving.popleft().wait()
                # Every other one is written; reads come from the other half of the file.
                at = offsets[(count + count % 2 * len(offsets) // 2) % len(offsets)]
                act = engine.write if count % 2 else engine.read
                moving.append(act(file, at, blocks[count % NUM_BLOCKS]))
                count += 1
            for transfer in moving:
                transfer.wait()
            return count * BLOCK_BYTES, time.perf_counter() - began

    def at_once(path: str) -> tuple[int, float]:
        try:
            return move(path)
        except BaseException:
            start.abort()  # nobody waits for this one
            raise

    try:
        with (
            tempfile.TemporaryDirectory(prefix=".preflight-", dir=folder) as made,
            ThreadPoolExecutor(ranks) as pool,
        ):
            found = list(pool.map(at_once, [os.path.join(made, str(rank)) for rank in range(ranks)]))
    except OSError as error:
        raise OffloadDiskError(
            error.errno or errno.EIO, f"preflight: {folder}: cannot be measured: {error}"
        ) from error
    return sum(moved / taken for moved, taken in found) / 1e9


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
