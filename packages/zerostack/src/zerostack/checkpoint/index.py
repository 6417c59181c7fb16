"""The JSON that makes a directory a checkpoint: every tensor, every piece with its file and checksum, every value.

In: planned pieces with checksums, and values. Out: `index.json`; and back, checked. The body carries a checksum of
its own, so a damaged index is noticed too.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .files import FORMAT, INDEX, write_text
from .tensor_file import dtype_name, dtype_of

VERSION = 1


@dataclass(frozen=True)
class Stored:
    """Where one piece is."""

    file: str
    key: str
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor: its pieces cover it, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Stored, ...]


@dataclass(frozen=True)
class Index:
    """All there is to know about a checkpoint.

    Attributes:
        world: Number of ranks that wrote it.
        files: Size in bytes of each tensor file.
        tensors: By name.
        per_rank: For each rank that wrote, tensors that belong to that rank alone (random states).
        values: Small typed values.
    """

    world: int
    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    per_rank: tuple[dict[str, TensorEntry], ...]
    values: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write `index.json`, flushed to the disk."""
        body = {
            "world": self.world,
            "files": self.files,
            "tensors": {name: _entry_to_json(entry) for name, entry in self.tensors.items()},
            "per_rank": [
                {name: _entry_to_json(entry) for name, entry in entries.items()} for entries in self.per_rank
            ],
            "values": self.values,
        }
        text = {"format": FORMAT, "version": VERSION, "crc32": _crc(body), "body": body}
        write_text(directory / INDEX, json.dumps(text, indent=1, sort_keys=True) + "\n")

    @staticmethod
    def read(directory: Path) -> Index:
        """Read and check `index.json`.

        Raises:
            CheckpointError: If it is missing, damaged, or of another format or version.
        """
        path = directory / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or found["version"] > VERSION:
                raise CheckpointError(
                    f"{path}: expected {FORMAT} up to version {VERSION}, got {found['format']} {found['version']}"
                )
            if _crc(found["body"]) != found["crc32"]:
                raise CheckpointError(f"{path}: damaged: its checksum does not fit; load another tag")
            return _from_body(found["body"])
        except FileNotFoundError as error:
            raise CheckpointError(f"{directory} is no checkpoint: it has no {INDEX}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged: {type(error).__name__}: {error}; load another tag"
            ) from error


def _crc(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    pieces = [[p.file, p.key, p.start, p.stop, p.crc32] for p in entry.pieces]
    return {"shape": list(entry.shape), "dtype": dtype_name(entry.dtype), "pieces": pieces}


def _entry_from_json(raw: dict[str, Any]) -> TensorEntry:
    return TensorEntry(
        tuple(raw["shape"]), dtype_of(raw["dtype"]), tuple(Stored(*piece) for piece in raw["pieces"])
    )


def _from_body(body: dict[str, Any]) -> Index:
    def entries(raw: dict[str, Any]) -> dict[str, TensorEntry]:
        return {name: _entry_from_json(item) for name, item in raw.items()}

    return Index(
        world=body["world"],
        files=body["files"],
        tensors=entries(body["tensors"]),
        per_rank=tuple(entries(item) for item in body["per_rank"]),
        values=body["values"],
    )
