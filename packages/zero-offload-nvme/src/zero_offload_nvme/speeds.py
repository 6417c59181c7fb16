"""How fast this machine's tiers are: measured, in a few seconds.

In: folders, a number of ranks. Out: `forecast.Speeds`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import accel_kernels as ak
import torch

from .errors import OffloadDiskError
from .forecast import Speeds
from .free_bytes import existing

ELEMENTS = 16 << 20
"""Of each of four arrays: 256 MiB in all, more than a processor's caches."""
LINK_BYTES = 256 << 20
REPEATS = 5


def measure_speeds(paths: Sequence[str], *, ranks: int, device: str, seconds: float = 2.0) -> Speeds:
    """Measure memory, drives and link; nothing else should run meanwhile, so one rank of a machine does it.

    Args:
        paths: folders for an `NvmeStore`, or none.
        ranks: of this machine: as many cores are used as they will use.
        device: type of the device that computes.
        seconds: for each drive.

    Raises:
        OffloadDiskError: a folder cannot be written, or has less than 64 MiB free.

    Takes 256 MiB of memory for the time being, and on a drive a file of at most 256 MiB and a quarter of what is free.
    """
    drives = {os.stat(existing(path)).st_dev: existing(path) for path in paths}
    settings = [_tuned(folder, seconds) for folder in drives.values()]
    return Speeds(
        memory=memory_speed(min(len(os.sched_getaffinity(0)), ranks * torch.get_num_threads())),
        drive_read=sum(each.read_gb_per_s for each in settings) or None,
        drive_write=sum(each.write_gb_per_s for each in settings) or None,
        link=None if device == "cpu" else _link_speed(device),
    )


def memory_speed(num_threads: int) -> float:
    """GB/s of a stream that reads four arrays and writes three of them: AdamW's, by the kernel that will run."""
    param, grad, mean, square = (torch.rand(ELEMENTS) for _ in range(4))
    segments = [ak.AdamSegment(start=0, stop=ELEMENTS, lr=1e-3, step=10)]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        taken = _median(lambda: ak.adam_step(param, grad, mean, square, segments))
    finally:
        torch.set_num_threads(before)
    return 7 * 4 * ELEMENTS / 1e9 / taken


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
