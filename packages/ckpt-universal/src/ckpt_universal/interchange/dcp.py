"""Directories of torch.distributed.checkpoint (DCP): read part by part without unpickling code; written by torch.

DCP's `.metadata` is a pickle of a few dataclasses of torch; those are admitted by name, and no others.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from ..boxes import Box, intersect, whole_box
from ..errors import CheckpointError, ConfigError, CorruptError
from ..values import DTYPES, TensorRef
from .source import Described, Source
from .unpickle import load_plain

METADATA = ".metadata"
_METADATA_BYTES = 1 << 30

_CLASSES: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", name): getattr(metadata, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "_MEM_FORMAT_ENCODING", "StorageMeta",
    )
    if hasattr(metadata, name)
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}  # fmt: skip


class DcpSource:
    """A directory that `torch.distributed.checkpoint.save` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.left_out: list[str] = []
        file = path / METADATA
        if not file.exists():
            raise CheckpointError(
                f"{path}: no file {METADATA}; is it a directory of torch.distributed.checkpoint?"
            )
        if file.stat().st_size > _METADATA_BYTES:
            raise CorruptError(f"{file}: larger than any metadata")
        described = load_plain(file.read_bytes(), _CLASSES, str(file))
        if not isinstance(described, metadata.Metadata):
            raise CorruptError(f"{file}: not the metadata of a checkpoint")
        self._places: Mapping[Any, Any] = described.storage_data
        self._chunks: dict[str, list[Box]] = {}
        self._last: tuple[Any, torch.Tensor] | None = None
        tensors: dict[str, Described] = {}
        values: dict[str, Any] = {}
        for name, entry in described.state_dict_metadata.items():
            if isinstance(entry, metadata.TensorStorageMetadata):
                if entry.properties.dtype not in DTYPES.values():
                    raise CheckpointError(f"{file}: {name!r} has dtype {entry.properties.dtype}")
                tensors[name] = Described(tuple(entry.size), entry.properties.dtype)
                self._chunks[name] = [Box(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
            else:
                self._take_value(name, values)
        self.tensors: Mapping[str, Described] = tensors
        self.values: Any = values

    def _take_value(self, name: str, values: dict[str, Any]) -> None:
        try:
            values[name] = self._load(metadata.MetadataIndex(name))
        except CheckpointError as error:
            self.left_out.append(str(error))

    def _load(self, index: Any) -> Any:
        place = self._places.get(index)
        if place is None:
            raise CorruptError(f"{self.path}: {index.fqn!r}: the metadata does not say where it lies")
        name = str(place.relative_path)
        if Path(name).name != name:
            raise CorruptError(f"{self.path}: {name!r} is no name of a file in it")
        try:
            with Path(self.path, name).open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CorruptError(f"{self.path}/{name}: missing; it holds {index.fqn!r}") from None
        except Exception as error:  # torch refuses by name what is no tensor or plain container
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path}/{name}: {index.fqn!r}: {said}") from error

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        values = torch.empty(box.sizes, dtype=self.tensors[name].dtype)
        filled = 0
        for number, chunk in enumerate(self._chunks[name]):
            shared = intersect(chunk, box)
            if shared is None:
                continue
            loaded = self._chunk(name, number, chunk)
            values[_inside(shared, box)] = loaded[_inside(shared, chunk)]
            filled += shared.numel
        if filled != box.numel:
            raise CorruptError(f"{self.path}: {name!r}: {box.numel - filled} elements are in no chunk")
        return values

    def _chunk(self, name: str, number: int, box: Box) -> torch.Tensor:
        key = (name, number)
        if self._last is None or self._last[0] != key:
            offset = torch.Size(box.start)
            loaded = self._load(self._index(name, offset, number))
            if not isinstance(loaded, torch.Tensor) or loaded.numel() != box.numel:
                raise CorruptError(f"{self.path}: {name!r}: chunk {number} is not what the metadata says")
            self._last = (key, loaded.reshape(box.sizes))
        return self._last[1]

    def _index(self, name: str, offset: torch.Size, number: int) -> Any:
        for index in (metadata.MetadataIndex(name, offset, number), metadata.MetadataIndex(name, offset)):
            if index in self._places:
                return index
        return metadata.MetadataIndex(name)


def _inside(part: Box, whole: Box) -> tuple[slice, ...]:
    return tuple(slice(a - b, a - b + n) for a, b, n in zip(part.start, whole.start, part.sizes, strict=True))


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each when it is written."""

    def __init__(self, source: Source, progress: Callable[[int], None] | None) -> None:
        super().__init__(dedup_save_to_lowest_rank=False)
        self._source = source
        self._progress = progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The values of an item of the plan."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        name = write_item.index.fqn
        shape = self._source.tensors[name].shape
        values = self._source.read(name, whole_box(shape)) if math.prod(shape) else torch.empty(shape)
        if self._progress is not None:
            self._progress(values.numel() * values.element_size())
        return values.to(self._source.tensors[name].dtype)


def write_dcp(
    source: Source, out: str | os.PathLike[str], progress: Callable[[int], None] | None = None
) -> Path:
    """Write a directory that `torch.distributed.checkpoint.load` reads.

    Args:
        source: What to write.
        out: The directory; it must be new or empty.
        progress: Told of bytes written.

    Raises:
        ConfigError: `out` is there and not empty.

    Memory: one tensor at a time. Values beside tensors are written under their dotted paths.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: is there already; choose a new directory")
    state: dict[str, Any] = {
        name: torch.empty(described.shape, dtype=described.dtype, device="meta")
        for name, described in source.tensors.items()
    }
    for path, value in _plain_values(source.values, ""):
        state.setdefault(path, value)
    torch_save(
        state,
        storage_writer=FileSystemWriter(target, single_file_per_rank=True, thread_count=1),
        planner=_LazyPlanner(source, progress),
        no_dist=True,
    )
    return target


def _plain_values(node: Any, path: str) -> list[tuple[str, Any]]:
    if node is None or isinstance(node, TensorRef):
        return []
    if isinstance(node, dict):
        return [
            pair
            for key, each in node.items()
            for pair in _plain_values(each, f"{path}.{key}" if path else str(key))
        ]
    return [(path, node)] if type(node) in (int, float, str, bool) else []
