"""What goes wrong with drives: an engine whose requests fail on demand, small file systems, a loop that survives."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import accel_kernels as ak
import pytest
from accel_kernels import TransferError

MIB = 1 << 20


class _Failed:
    """A transfer that ends in an input/output error."""

    def __init__(self, inner, text: str, path: str) -> None:
        self._inner, self._text, self._path = inner, text, path
        self.nbytes = inner.nbytes

    def wait(self) -> None:
        self._inner.wait()
        raise TransferError(5, self._text, self._path)

    @property
    def memory(self):
        return self._inner.memory

    def is_done(self) -> bool:
        return self._inner.is_done()


class FaultyEngine(ak.TransferEngine):
    """Fails the read or write number `at` from `arm` on; moves half of its bytes, as a drive does."""

    def __init__(self) -> None:
        super().__init__()
        self._left: dict[str, int] = {}
        self.hits = 0

    def arm(self, what: str, at: int = 0) -> None:
        self._left = {what: at}

    def read(self, file, offset, out):
        return self._maybe("read", super().read, file, offset, out)

    def write(self, file, offset, data):
        return self._maybe("write", super().write, file, offset, data)

    def _maybe(self, what, call, file, offset, memory):
        left = self._left.get(what, -1)
        if what in self._left:
            self._left[what] = left - 1
        if left != 0:
            return call(file, offset, memory)
        self.hits += 1
        half = call(file, offset, memory[: memory.numel() // 2])
        text = f"{file.path}: {what} {memory.nbytes} bytes at offset {offset}: Input/output error"
        return _Failed(half, text, file.path)


@contextmanager
def mounted(folder: Path, nbytes: int) -> Iterator[Path]:
    """A small file system, or the test is skipped."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        with suppress(OSError):
            subprocess.run(["umount", "-l", str(folder)], check=False)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
