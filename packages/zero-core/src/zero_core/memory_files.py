"""Files in memory that the ranks of one machine find by an address, and whether the others still live.

Out: what `shared_memory` maps. The files have no name; processes open them through /proc.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """Files: another rank's memory, and its process."""

    file: int
    life: int


def create(nbytes: int) -> tuple[int | None, bytes]:
    """A new file in memory, filled with zeros, and the address under which other processes of this machine find it."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return None, b""
    name = f"zero_core-{secrets.token_hex(8)}"
    file = None
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.posix_fallocate(file, 0, nbytes)
    except OSError:  # a sandbox that allows neither
        if file is not None:
            os.close(file)
        return None, b""
    return file, f"{machine} {os.getpid()} {file} /memfd:{name}".encode()


def open_peer(address: bytes) -> Peer | None:
    """What is at an address of `create`; None if on another machine, or cannot be opened, or is another's."""
    file = None
    try:
        machine, process, number, name = address.decode().split(" ")
        path = f"/proc/{process}/fd/{number}"
        if machine != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return None
        if not os.readlink(path).startswith(name):  # the number of a process in another namespace
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return Peer(file, os.pidfd_open(int(process)))
    except (AttributeError, OSError, ValueError):  # no pidfd_open before Linux 5.3
        if file is not None:
            os.close(file)
        return None
