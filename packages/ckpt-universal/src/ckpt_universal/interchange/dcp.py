"""Directories of torch.distributed.checkpoint (DCP): read part by part without unpickling code; written by torch.

DCP's `.metadata` is a pickle of a few dataclasses of torch; those are admitted by name, and no others.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from ..boxes import Box, cut, flat_range, intersect, whole_box
from ..errors import CheckpointError, ConfigError, CorruptError
from ..values import DTYPES, TensorRef
from .source import PART_BYTES, Described, Source, reading
from .torch_records import Stored, find_stored
from .unpickle import Call, Sealed, load_plain

METADATA = ".metadata"
_METADATA_BYTES = 1 << 30


class _Index(metadata.MetadataIndex, metaclass=Sealed):
    """As the keys of a file's metadata; equal to none of torch's own class."""


class _Properties(metaclass=Sealed):
    """What the metadata says of a tensor beside its shape."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Of layout, gradient and memory format nothing is wanted."""
        self.dtype = state[0]


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch.distributed.checkpoint.metadata", name): Sealed(name, (getattr(metadata, name),), {})
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta",
    )
    if hasattr(metadata, name)
} | {
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Index,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Properties,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): Call(int),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Sealed("_StorageInfo", (filesystem._StorageInfo,), {}),
    ("torch.serialization", "_get_layout"): Call(str),
    ("pathlib", "PosixPath"): Call(PurePosixPath),
    ("pathlib._local", "PosixPath"): Call(PurePosixPath),
}  # fmt: skip
"""What the metadata may name, as it gets it: see Note [What a pickle is handed] in `unpickle`."""


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
        self._places: Mapping[Any, Any] = {}
        self._chunks: dict[str, list[Box]] = {}
        self._last: tuple[Any, torch.Tensor] | None = None
        self._found: tuple[Any, Stored | None] | None = None
        self.tensors: Mapping[str, Described] = {}
        self.values: Any = {}
        with reading(file):
            self._take(described, file)

    def _take(self, described: metadata.Metadata, file: Path) -> None:
        if not isinstance(described.storage_data, dict):
            raise TypeError("it does not say where values lie")
        self._places = described.storage_data
        tensors: dict[str, Described] = {}
        for name, entry in described.state_dict_metadata.items():
            if type(name) is not str:
                raise TypeError(f"{name!r} is no name")
            if isinstance(entry, metadata.TensorStorageMetadata):
                if entry.properties.dtype not in DTYPES.values():
                    raise CheckpointError(f"{file}: {name!r} has dtype {entry.properties.dtype}")
                tensors[name] = Described(tuple(entry.size), entry.properties.dtype)
                self._chunks[name] = [_box(chunk, tensors[name].shape) for chunk in entry.chunks]
            else:
                self._take_value(name, self.values)
        self.tensors = tensors

    def _take_value(self, name: str, values: dict[str, Any]) -> None:
        try:
            values[name] = self._load(_Index(name))
        except CheckpointError as error:
            self.left_out.append(str(error))

    def _load(self, index: Any) -> Any:
        place = self._places.get(index)
        if place is None:
            raise CorruptError(f"{self.path}: {index.fqn!r}: the metadata does not say where it lies")
        path = self._file_of(place)
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CorruptError(f"{path}: missing; it holds {index.fqn!r}") from None
        except Exception as error:  # torch refuses by name what is no tensor or plain container
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: {index.fqn!r}: {said}") from error

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        with reading(self.path):
            return self._read(name, box)

    def _read(self, name: str, box: Box) -> torch.Tensor:
        values = torch.empty(box.sizes, dtype=self.tensors[name].dtype)
        filled = 0
        for number, chunk in enumerate(self._chunks[name]):
            shared = intersect(chunk, box)
            if shared is None:
                continue
            values[_inside(shared, box)] = self._part(name, number, chunk, shared)
            filled += shared.numel
        if filled != box.numel:
            raise CorruptError(f"{self.path}: {name!r}: {box.numel - filled} elements are in no chunk")
        return values

    def _part(self, name: str, number: int, chunk: Box, part: Box) -> torch.Tensor:
        """A part of a chunk, without the rest of it where it can be."""
        local = Box(tuple(a - b for a, b in zip(part.start, chunk.start, strict=True)), part.sizes)
        span = flat_range(chunk.sizes, local)
        stored = self._stored(name, number, chunk)
        if span is None or stored is None:
            return self._chunk(name, number, chunk)[_inside(part, chunk)]
        return stored.read(*span).view(part.sizes)

    def _stored(self, name: str, number: int, chunk: Box) -> Stored | None:
        if self._found is None or self._found[0] != (name, number):
            place = self._places.get(self._index(name, torch.Size(chunk.start), number))
            found = None
            if place is not None and not getattr(place, "transform_descriptors", None):
                found = find_stored(self._file_of(place), place.offset, place.length)
            if found is not None and (
                found.dtype is not self.tensors[name].dtype or found.numel != chunk.numel
            ):
                found = None
            self._found = ((name, number), found)
        return self._found[1]

    def _file_of(self, place: Any) -> Path:
        name = str(place.relative_path)
        if Path(name).name != name:
            raise CorruptError(f"{self.path}: {name!r} is no name of a file in it")
        return Path(self.path, name)

    def _chunk(self, name: str, number: int, box: Box) -> torch.Tensor:
        key = (name, number)
        if self._last is None or self._last[0] != key:
            offset = torch.Size(box.start)
            loaded = self._load(self._index(name, offset, number))
            wanted = self.tensors[name].dtype
            if (
                not isinstance(loaded, torch.Tensor)
                or loaded.numel() != box.numel
                or loaded.dtype is not wanted
            ):
                raise CorruptError(f"{self.path}: {name!r}: chunk {number} is not what the metadata says")
            self._last = (key, loaded.reshape(box.sizes))
        return self._last[1]

    def _index(self, name: str, offset: torch.Size, number: int) -> Any:
        for index in (_Index(name, offset, number), _Index(name, offset)):
            if index in self._places:
                return index
        return _Index(name)


def _box(chunk: Any, shape: tuple[int, ...]) -> Box:
    box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
    if not box.within(shape):
        raise ValueError(f"a chunk at {box.start} of {box.sizes} is not inside of shape {shape}")
    return box


def _inside(part: Box, whole: Box) -> tuple[slice, ...]:
    return tuple(slice(a - b, a - b + n) for a, b, n in zip(part.start, whole.start, part.sizes, strict=True))


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each when it is written."""

    def __init__(self, source: Source, progress: Callable[[int], None] | None) -> None:
        super().__init__(dedup_save_to_lowest_rank=False)
        self._source = source
        self._progress = progress

    def create_local_plan(self) -> SavePlan:
        """The plan, with a chunk for each part of a tensor that is read at once."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in _parts_of(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The values of an item of the plan."""
        chunk = write_item.tensor_data.chunk if write_item.tensor_data else None
        if chunk is None:
            return super().resolve_data(write_item)
        name = write_item.index.fqn
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        values = self._source.read(name, box) if box.numel else torch.empty(box.sizes)
        if self._progress is not None:
            self._progress(values.numel() * values.element_size())
        return values.to(self._source.tensors[name].dtype)


def _parts_of(item: WriteItem) -> Iterator[WriteItem]:
    data = item.tensor_data
    boxes = []
    if data is not None:
        boxes = list(cut(whole_box(data.size), PART_BYTES // data.properties.dtype.itemsize))
    if data is None or len(boxes) == 1:
        yield item
        return
    for box in boxes:
        start, sizes = torch.Size(box.start), torch.Size(box.sizes)
        yield WriteItem(
            metadata.MetadataIndex(item.index.fqn, start),
            WriteItemType.SHARD,
            tensor_data=replace(data, chunk=metadata.ChunkStorageMetadata(start, sizes)),
        )


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

    Memory: 64 MiB, whatever the sizes. Values beside tensors are written under their dotted paths.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: is there already; choose a new directory")
    state: dict[str, Any] = {
        name: torch.empty(described.shape, dtype=described.dtype, device="meta")
        for name, described in source.tensors.items()
    }
    for path, value in _plain_values(source.values, "", source.left_out):
        state.setdefault(path, value)
    torch_save(
        state,
        storage_writer=FileSystemWriter(target, single_file_per_rank=True, thread_count=1),
        planner=_LazyPlanner(source, progress),
        no_dist=True,
    )
    return target


def _plain_values(node: Any, path: str, left_out: list[str]) -> list[tuple[str, Any]]:
    """Numbers and texts by their dotted paths; `left_out` gets a line for each thing that is neither."""
    if node is None or isinstance(node, TensorRef):
        return []
    if isinstance(node, (dict, list, tuple)):
        inside = node.items() if isinstance(node, dict) else enumerate(node)
        return [
            pair
            for key, each in inside
            for pair in _plain_values(each, f"{path}.{key}" if path else str(key), left_out)
        ]
    if type(node) in (int, float, str, bool):
        return [(path, node)]
    left_out.append(
        f"{path}: of type {type(node).__name__}, which the format has no place for beside tensors"
    )
    return []
