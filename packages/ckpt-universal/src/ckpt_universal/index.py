"""What a committed step consists of: the index, and the marker that commits it.

In: files, tensors with their chunks, and values. Out: msgpack, as docs/ckpt-universal-format.md describes byte by byte;
and back, with every number checked, since an index may come from anywhere: no path that leaves the directory, no
allocation that the bytes at hand do not justify.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import msgpack

from .boxes import Box, covers_once
from .codecs import MOST_RATIO, RAW
from .errors import CheckpointError, ConfigError, CorruptError
from .pages import checksum, num_pages
from .values import DTYPES, pack, references, unpack

FORMAT, VERSION = "ckpt-universal", 1
MARKER = "COMMIT"
CODECS = ("raw", "zstd", "zstd-bytes")
"""As it is; compressed; compressed after the first bytes of all elements, then the second ones, and so on."""
MAX_DIMS = 64
"""Torch knows no more."""
_TOKEN = r"[0-9a-f]{16}"
_DATA_NAME = re.compile(rf"data-{_TOKEN}-[0-9]{{5,}}\.bin")
_INDEX_NAME = re.compile(rf"index-{_TOKEN}\.msgpack")
_NUMBER = re.compile("[0-9]{1,18}")
T = TypeVar("T")


def data_name(token: str, rank: int) -> str:
    """The name of the file of one rank; a save has a token of its own, so that two never share a file."""
    return f"data-{token}-{rank:05d}.bin"


def index_name(token: str) -> str:
    """The name of a save's index."""
    return f"index-{token}.msgpack"


@dataclass(frozen=True)
class FileRecord:
    """A data file: `data_bytes` of chunks, then the footer, whose checksum is `footer`."""

    name: str
    data_bytes: int
    footer: int

    def num_bytes(self, page_bytes: int) -> int:
        """Bytes of the file."""
        return self.data_bytes + 8 * num_pages(self.data_bytes, page_bytes)


@dataclass(frozen=True)
class ChunkRecord:
    """A part of a tensor: where it lies, how long it is there, and how it is encoded (position in `CODECS`)."""

    file: int
    offset: int
    nbytes: int
    codec: int
    box: Box


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor and the chunks that cover it."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[ChunkRecord, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Index:
    """One step.

    Attributes:
        step: the number it was saved under.
        created_s: when, in seconds since 1970.
        world: ranks that saved.
        page_bytes: what checksums are of.
        values: the state tree with `values.TensorRef` in place of tensors.
    """

    step: int
    created_s: float
    world: int
    page_bytes: int
    files: tuple[FileRecord, ...]
    tensors: dict[str, TensorRecord]
    values: Any = field(default=None)

    def pack(self) -> bytes:
        """As msgpack.

        Raises:
            ConfigError: the values refer to a tensor twice, or to one that there is not.
        """
        try:
            _check_references(self.values, self.tensors)
        except ValueError as error:
            raise ConfigError(f"state: {error}; rename one of the keys on the way to it") from None
        content = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "created_s": self.created_s,
            "world": self.world,
            "page_bytes": self.page_bytes,
            "files": [[f.name, f.data_bytes, f.footer] for f in self.files],
            "tensors": {
                name: [
                    t.dtype,
                    list(t.shape),
                    [
                        [c.file, c.offset, c.nbytes, c.codec, list(c.box.start), list(c.box.sizes)]
                        for c in t.chunks
                    ],
                ]
                for name, t in self.tensors.items()
            },
            "values": pack(self.values, "state"),
        }
        packed: bytes = msgpack.packb(content, use_bin_type=True)
        return packed


def unpack_index(packed: bytes, where: str) -> Index:
    """The index of `Index.pack`, checked.

    Raises:
        CorruptError: it is none, or contradicts itself.
        CheckpointError: it is of a later version.
    """
    return _guarded(lambda: _index(msgpack.unpackb(packed, raw=False, strict_map_key=True), where), where)


def _guarded(parse: Callable[[], T], where: str) -> T:
    try:
        return parse()
    except CheckpointError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        RuntimeError,
        msgpack.UnpackException,
    ) as error:
        raise CorruptError(f"{where}: not an index of {FORMAT}: {error}") from error


def _index(content: Any, where: str) -> Index:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("it does not say that it is one")
    version = _count(content["version"])
    if version > VERSION:
        raise CheckpointError(
            f"{where} is of version {version} of the format, this package reads up to {VERSION}; update it"
        )
    page_bytes = _count(content["page_bytes"])
    if not 512 <= page_bytes <= 1 << 30:
        raise ValueError(f"page_bytes is {page_bytes}")
    files = tuple(
        FileRecord(_name(name, _DATA_NAME), _count(data_bytes), _count(footer))
        for name, data_bytes, footer in content["files"]
    )
    tensors = {str(name): _tensor(str(name), raw, files) for name, raw in content["tensors"].items()}
    _check_places(tensors, files)
    created_s = float(content["created_s"])
    values = unpack(content["values"], where)
    _check_references(values, tensors)
    return Index(
        step=_count(content["step"]),
        created_s=created_s,
        world=_count(content["world"]),
        page_bytes=page_bytes,
        files=files,
        tensors=tensors,
        values=values,
    )


def _tensor(name: str, raw: Any, files: tuple[FileRecord, ...]) -> TensorRecord:
    dtype, shape, chunks = raw
    if dtype not in DTYPES:
        raise ValueError(f"{name!r} has dtype {dtype!r}, which this torch lacks")
    dims = _dims(shape)
    if math.prod(max(size, 1) for size in dims) * DTYPES[dtype].itemsize >= 1 << 63:
        raise ValueError(f"{name!r}: no tensor of shape {dims} can be")
    record = TensorRecord(dims, dtype, tuple(_chunk(name, dims, each, files) for each in chunks))
    covered = sum(chunk.box.numel for chunk in record.chunks)
    if covered != math.prod(dims):
        raise ValueError(f"{name!r}: chunks hold {covered} of {math.prod(dims)} elements")
    for chunk in record.chunks:
        raw_bytes = chunk.box.numel * record.itemsize
        if chunk.codec == RAW and chunk.nbytes != raw_bytes:
            raise ValueError(f"{name!r}: a chunk of {chunk.nbytes} bytes, expected {raw_bytes}")
        if raw_bytes > chunk.nbytes * MOST_RATIO:
            raise ValueError(f"{name!r}: no {chunk.nbytes} bytes can decompress to {raw_bytes}")
    if not covers_once(dims, [chunk.box for chunk in record.chunks]):
        raise ValueError(f"{name!r}: chunks overlap, and leave out others of its elements")
    return record


def _check_places(tensors: dict[str, TensorRecord], files: tuple[FileRecord, ...]) -> None:
    """No byte of a file is in two chunks: else a small file would stand for any number of tensors."""
    places = sorted(
        (chunk.file, chunk.offset, chunk.offset + chunk.nbytes)
        for tensor in tensors.values()
        for chunk in tensor.chunks
    )
    for (file, _, stop), (other, start, _) in pairwise(places):
        if file == other and start < stop:
            raise ValueError(f"two chunks lie at byte {start} of {files[file].name}")


def _check_references(values: Any, tensors: dict[str, TensorRecord]) -> None:
    """Every tensor that is referred to is there, and is not referred to twice."""
    seen: set[str] = set()
    for name in references(values):
        if name in seen:
            raise ValueError(f"two places of the tree have the tensor {name!r}")
        if name not in tensors:
            raise ValueError(f"the tree refers to a tensor {name!r} that there is not")
        seen.add(name)


def _chunk(name: str, shape: tuple[int, ...], raw: Any, files: tuple[FileRecord, ...]) -> ChunkRecord:
    file, offset, nbytes, codec, start, sizes = raw
    box = Box(_dims(start), _dims(sizes))
    chunk = ChunkRecord(_count(file), _count(offset), _count(nbytes), _count(codec), box)
    if chunk.codec >= len(CODECS):
        raise ValueError(f"{name!r}: unknown codec {chunk.codec}")
    if not box.within(shape) or not box.numel:
        raise ValueError(f"{name!r}: chunk {box} is not within {shape}")
    if chunk.offset + chunk.nbytes > files[chunk.file].data_bytes:
        raise ValueError(f"{name!r}: a chunk ends behind the data of {files[chunk.file].name}")
    return chunk


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number >= 0, got {value!r}")
    return value


def _dims(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ValueError(f"expected at most {MAX_DIMS} sizes")
    for each in value:
        if type(each) is not int or each < 0:
            _count(each)
    return tuple(value)


def _name(value: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is not the name of a file of a checkpoint")
    return value


@dataclass(frozen=True)
class Marker:
    """What commits a step: which index counts, how long it is, and its checksum."""

    index: str
    nbytes: int
    checksum: int

    @staticmethod
    def of(name: str, packed: bytes) -> Marker:
        """For an index."""
        return Marker(name, len(packed), checksum(packed))

    def text(self) -> bytes:
        """The content of the file `COMMIT`: one line."""
        return f"{FORMAT} {VERSION} {self.index} {self.nbytes} {self.checksum:016x}\n".encode()

    @property
    def token(self) -> str:
        """Of the save that it commits."""
        return self.index.removeprefix("index-").removesuffix(".msgpack")


def parse_marker(text: bytes, where: str) -> Marker:
    """The marker of `Marker.text`.

    Raises:
        CorruptError: it is none.
        CheckpointError: it is of a later version.
    """
    words = text.decode(errors="replace").split()
    if len(words) != 5 or words[0] != FORMAT or not _NUMBER.fullmatch(words[1]):
        raise CorruptError(f"{where}: not a commit marker of {FORMAT}")
    if int(words[1]) > VERSION:
        raise CheckpointError(
            f"{where} is of version {words[1]} of the format, this package reads up to {VERSION}; update it"
        )
    if not (
        _INDEX_NAME.fullmatch(words[2])
        and _NUMBER.fullmatch(words[3])
        and re.fullmatch("[0-9a-f]{16}", words[4])
    ):
        raise CorruptError(f"{where}: not a commit marker of {FORMAT}")
    return Marker(words[2], int(words[3]), int(words[4], 16))
