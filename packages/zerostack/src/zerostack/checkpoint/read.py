"""Read a checkpoint on any number of ranks: each rank only the pieces that touch its ranges, all of them checked.

In: a directory, perhaps a tag, and the ranges that this rank wants. Out: tensors of exactly those ranges, on the
host. Nothing of the caller is touched before every rank has everything it asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import ranks
from ..errors import CheckpointError
from . import files
from .index import Index, TensorEntry
from .layout import Range, overlapping
from .tensor_file import TensorFile

_DOING = "loading the checkpoint"


class Reader:
    """An open checkpoint.

    Args:
        path: Its directory.
        group: The ranks that read it.

    Attributes:
        path: Its directory.
        index: What it holds.
    """

    def __init__(self, path: Path, group: dist.ProcessGroup) -> None:
        self.path = path
        self._group = group
        self.index: Index = self.together(lambda: Index.read(path))
        self._files = {name: TensorFile(path / name, size) for name, size in self.index.files.items()}

    def together(self, work: Any) -> Any:
        """Run one part of loading on every rank; all go on or all fail.

        Raises:
            CheckpointError: On ranks whose own part went well.
        """
        error: BaseException | None = None
        result = None
        try:
            result = work()
        except (OSError, ValueError, TypeError, CheckpointError) as caught:
            error = caught
        ranks.agree(error, self._group, CheckpointError, f"{_DOING} {self.path}")
        return result

    def read(
        self, wanted: Mapping[str, Range], sources: Mapping[str, str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Read this rank's ranges; every rank calls it.

        Args:
            wanted: Ranges by name.
            sources: For names that are stored under another one, that one.

        Returns:
            1-D host tensors of the ranges' lengths, in the ranges' dtypes.

        Raises:
            CheckpointError: For a name that is not there, another shape, a missing, cut off or damaged file.
        """
        sources = sources or {}

        def work() -> dict[str, torch.Tensor]:
            self._check(wanted, sources)
            return {name: self._range(sources.get(name, name), r) for name, r in wanted.items()}

        found: dict[str, torch.Tensor] = self.together(work)
        return found

    def own(self) -> dict[str, torch.Tensor]:
        """What this rank saved for itself; empty where the number of ranks has changed. Every rank calls it."""

        def work() -> dict[str, torch.Tensor]:
            if self.index.world != self._group.size():
                return {}
            entries = self.index.per_rank[self._group.rank()]
            return {name: self._pieces(name, entry, 0, entry.shape[0]) for name, entry in entries.items()}

        found: dict[str, torch.Tensor] = self.together(work)
        return found

    def _check(self, wanted: Mapping[str, Range], sources: Mapping[str, str]) -> None:
        problems = []
        for name, range_ in wanted.items():
            entry = self.index.tensors.get(sources.get(name, name))
            if entry is None:
                problems.append(f"{name!r} is missing")
            elif entry.shape != range_.shape:
                problems.append(f"{name!r} has shape {entry.shape}, expected {range_.shape}")
        if problems:
            raise CheckpointError(f"{self.path} does not fit: {_few(problems)}")

    def _range(self, name: str, wanted: Range) -> torch.Tensor:
        return self._pieces(name, self.index.tensors[name], wanted.start, wanted.stop).to(wanted.dtype)

    def _pieces(self, name: str, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        parts = []
        for i in overlapping([piece.stop for piece in entry.pieces], start, stop):
            piece = entry.pieces[i]
            described = f"tensor {name!r}, elements {piece.start} to {piece.stop}"
            data = self._files[piece.file].read(piece.key, piece.crc32, described)
            parts.append(data[max(start - piece.start, 0) : stop - piece.start])
        return torch.cat(parts) if parts else torch.empty(0, dtype=entry.dtype)


def _few(problems: list[str], most: int = 5) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def open_checkpoint(root: Path, tag: str | None, group: dist.ProcessGroup) -> Reader | None:
    """Find and open a checkpoint; every rank calls it.

    Args:
        root: Directory of checkpoints.
        tag: Which one; None means the one that `latest` names.
        group: The ranks that read.

    Returns:
        None where no tag is given and there is no `latest`.

    Raises:
        CheckpointError: If the checkpoint is not there, or its index is damaged.
    """
    asked = "" if tag is None else tag
    found = asked or files.latest_tag(root) or ""
    tag = ranks.gather_text(found, group)[0]
    if not tag:
        return None
    path = root / tag
    present = ranks.gather_text("yes" if path.is_dir() else "", group)
    if not all(present):
        known = ", ".join(files.tags(root)) or "none"
        missing = [rank for rank, text in enumerate(present) if not text]
        who = "" if len(missing) == group.size() else f" on ranks {missing} (is the directory shared?)"
        origin = "" if asked else f" (named by {root / files.LATEST})"
        raise CheckpointError(f"{path}: no such checkpoint{origin}{who}; present: {known}")
    return Reader(path, group)
