"""Bytes to learn from, in a fixed order, with a part kept apart to test on.

In: a file, a folder, or nothing (then Python's own standard library). Out: two byte tensors, and batches that
depend on nothing but seed, step and rank, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ZerostackError

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT_EVERY = 20


class TextError(ZerostackError, ValueError):
    """There is no text, or too little of it."""


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text that is kept apart, both uint8 [bytes]."""

    train: Tensor
    held_out: Tensor
    origin: str

    def batch(self, *, seed: int, step: int, rank: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Random windows: tokens and the tokens that follow them, int64 [size, context] each."""
        return _windows(self.train, (seed, step, rank), size, context)

    def held_out_batches(self, *, count: int, size: int, context: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same windows of the text kept apart, every time."""
        return (_windows(self.held_out, (0, step, -1), size, context) for step in range(count))


def _windows(data: Tensor, key: tuple[int, int, int], size: int, context: int) -> tuple[Tensor, Tensor]:
    seed, step, rank = key
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1009 + rank + 1)
    starts = torch.randint(len(data) - context, (size,), generator=generator)
    rows = torch.stack([data[start : start + context + 1] for start in starts.tolist()]).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def load(path: str | None, context: int) -> Corpus:
    """Read the text.

    Args:
        path: A file, or a folder of text files; None means the standard library's `.py` files.
        context: Length of a training window in bytes.

    Raises:
        TextError: If there is nothing to read, or not enough for a handful of windows.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in sorted(root.rglob("*.py")) if not _SKIPPED & set(p.relative_to(root).parts)]
        pieces = [p.read_bytes() for p in files]
        origin = f"the standard library of this Python ({len(files)} files)"
    else:
        pieces, origin = _user_text(Path(path))
    train = b"\n".join(piece for i, piece in enumerate(pieces) if (i + 1) % _HELD_OUT_EVERY)
    held_out = b"\n".join(piece for i, piece in enumerate(pieces) if not (i + 1) % _HELD_OUT_EVERY)
    if (
        len(held_out) < context + 2 or len(train) < context + 2
    ):  # few or very uneven files: the end of the text
        train = b"\n".join(pieces)
        cut = len(train) - len(train) // _HELD_OUT_EVERY
        train, held_out = train[:cut], train[cut:]
    if len(held_out) < context + 2:
        needed = (context + 2) * _HELD_OUT_EVERY
        raise TextError(
            f"--text {path}: {len(train) + len(held_out)} bytes are too few; give at least {needed}"
        )
    return Corpus(_tensor(train), _tensor(held_out), origin)


def _user_text(path: Path) -> tuple[list[bytes], str]:
    if path.is_file():
        return [path.read_bytes()], str(path)
    if not path.is_dir():
        raise TextError(f"--text {path}: no such file or folder")
    candidates = [p for p in sorted(path.rglob("*")) if p.is_file() and ".git" not in p.parts]
    texts = [data for data in (p.read_bytes() for p in candidates) if data and b"\0" not in data[:4096]]
    if not texts:
        raise TextError(f"--text {path}: no text file in this folder")
    return texts, f"{path} ({len(texts)} files)"


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
