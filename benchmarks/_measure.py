"""What a benchmark can ask its own process and machine: memory, processor time, bytes on the loopback wire."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
from pathlib import Path

import torch

MIB = 1 << 20


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """The most that has been in RAM since `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Let the peak start again from what is resident now (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def give_back_free_memory() -> None:
    """Have the C library return freed memory to the system, so that what stays resident is in use."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: it has its own ways
        return


def live_tensor_bytes() -> int:
    """Bytes of all storages that Python can reach a tensor of, each once."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):
                continue  # a wrapper; its inner tensors are found by themselves
    return sum(storages.values())


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface since boot, by every process, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise OSError("/proc/net/dev has no loopback interface")


def drive_busy_s(path: str) -> float | None:
    """Seconds since boot in which the drive of a path had something to do (Linux: block/stat, io_ticks).

    None: the system counts none for it.
    """
    number = os.stat(path).st_dev
    try:
        counters = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat").read_text().split()
    except OSError:
        return None
    return int(counters[9]) / 1e3


def hardware() -> dict[str, object]:
    """The machine, for a result's record."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model or platform.processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def today() -> str:
    """The date, as results carry it."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
