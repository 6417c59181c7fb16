"""Facts about this machine, read when asked: processor, memory, bfloat16."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_model() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_bfloat16() -> str | None:
    """The processor's instructions for bfloat16 matrix products, or None where they are emulated and slow."""
    info = _cpuinfo()
    features = set((info.get("flags") or info.get("Features") or "").split())
    for name in ("amx_bf16", "avx512_bf16", "bf16"):
        if name in features:
            return name
    return None


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def environment_of_each(procs: int) -> dict[str, str]:
    """Variables for each of several processes that compute on this machine's processor; what is set already stays.

    An equal share of the cores; and a C library that keeps freed memory: by default it gives large blocks back at
    once, and a training step would spend several per cent of its time on getting the same pages again.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // procs))}
    if not torch.accelerator.is_available():
        wanted |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def bfloat16_pays(device: torch.device) -> tuple[bool, str]:
    """Whether maths in bfloat16 are faster than in fp32 on a device, and why."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
        return supported, f"the GPU {'has' if supported else 'lacks'} bfloat16 matrix units"
    instructions = cpu_bfloat16()
    if instructions is None:
        return False, "the processor emulates bfloat16"
    return True, f"the processor has {instructions}"
