"""How much of each tier is free: host memory as this process may use it, drives, the device.

In: what the system says. Out: `Free`. A limit of a container (cgroup) or of the process counts like the machine's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Free:
    """Bytes; None: nobody can tell, or nobody asked.

    Attributes:
        host: memory of this machine, for all its ranks.
        address_space: that this process may still map (`ulimit -v`); None: as much as it likes.
        drive: for all ranks of this machine, on all drives together.
        num_drives: that these bytes are on.
        device: this rank's.
    """

    host: int | None = None
    address_space: int | None = None
    drive: int | None = None
    num_drives: int = 1
    device: int | None = None


def free_bytes(paths: Sequence[str], device: str) -> Free:
    """What is free now.

    Args:
        paths: folders for an `NvmeStore`; those on one file system count once.
        device: type of the device that computes.
    """
    return Free(
        host=host_free(),
        address_space=address_space_free(),
        drive=drive_free(paths) if paths else None,
        num_drives=len({os.stat(existing(path)).st_dev for path in paths}) or 1,
        device=torch.cuda.mem_get_info()[0] if device == "cuda" else None,
    )


def host_free(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process and its siblings can have: the machine's, or less where a cgroup says so."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        line = next(x for x in (proc / "meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    found += _cgroup_free(proc, cgroups)
    return max(min(found), 0) if found else None


def _cgroup_free(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of this process's cgroups with a limit on memory, versions 1 and 2, and of those above them."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, usage, reclaimable = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        # In a container, the path may be that of the host, which is not mounted here: then its root is the container's.
        own = root / path.lstrip("/")
        for folder in (own, *(each for each in own.parents if each.is_relative_to(root))):
            with suppress(OSError, ValueError):  # no such folder, no limit ("max"), no such file
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                yield most - used + _stat(folder / "memory.stat", reclaimable)


def _stat(path: Path, name: str) -> int:
    """Pages of files that the kernel gives up before it refuses memory."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def address_space_free(proc: Path = Path("/proc")) -> int | None:
    """Bytes that this process may still map under RLIMIT_AS; None: no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    used = 0
    with suppress(OSError, ValueError):
        used = int((proc / "self" / "statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return max(soft - used, 0)


def drive_free(paths: Sequence[str]) -> int:
    """Bytes that this user may have on the file systems of these folders, which need not exist yet."""
    devices = {}
    for path in paths:
        folder = existing(path)
        at = os.statvfs(folder)
        devices[os.stat(folder).st_dev] = at.f_bavail * at.f_frsize
    return sum(devices.values())


def existing(path: str) -> str:
    """The folder, or the nearest one above it that is there."""
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder
