"""What the tests of transfers share: engines to run on, a small full disk, a child that is refused io_uring."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accel_kernels.transfers.drivers import DRIVERS, why_not

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(why_not(name) is not None, reason=str(why_not(name))))
    for name in DRIVERS
]


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def num_descriptors() -> int:
    gc.collect()  # those of objects that nobody holds are closed when it pleases Python
    return len(os.listdir("/proc/self/fd"))


def becomes(true: Callable[[], bool], within_s: float = 10.0) -> bool:
    """Whether something is so, now or soon."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def command(*words: str) -> str:
    """Run a system tool; skips the test where it is missing or refuses."""
    try:
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"needs root and {words[0]}: {said[0] if said else 'it failed'}")


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A tmpfs of so many MiB."""
    folder.mkdir()
    command("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# A filter that makes io_uring_setup (425 on every architecture) fail as container runtimes do it.
REFUSE_URING = """
import ctypes, struct
def refuse():
    program = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *op) for op in program))
    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    filter = Filter(len(program), ctypes.addressof(code))
    assert libc.prctl(22, 2, ctypes.byref(filter)) == 0, ctypes.get_errno()
refuse()
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter, to its end."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
