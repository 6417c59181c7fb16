"""Safetensors: directories in the layout of Hugging Face (several files and an index), and single files.

Written as a stream, so that no tensor need be whole in memory; a directory appears when it is complete.
Source: the safetensors format (8 bytes of header length, a JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..boxes import Box
from ..errors import CheckpointError, ConfigError, CorruptError
from ..writer import bytes_of
from .source import Described, Source, parts_of, reading

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
"""The dtypes of the format, by torch's."""
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
INDEX = "model.safetensors.index.json"


def write_safetensors_file(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file as its values come, flushed to the disk; the caller renames it into place.

    Args:
        path: The file.
        specs: Dtype and shape of each tensor, in the order in which they lie.
        parts: Names with values: whole tensors, in any order, or parts of them, each tensor's in row-major order.
        metadata: Text beside them.

    Raises:
        ConfigError: The format lacks a dtype; nothing was written.
        OSError: The disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, (dtype, shape) in specs.items():
        if dtype not in NAMES:
            raise ConfigError(f"tensor {name!r}: dtype {dtype} has no place in a safetensors file")
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, values in parts:
            data = bytes_of(values)
            file.seek(8 + len(text) + starts[name])
            file.write(data)
            starts[name] += len(data)
        file.truncate(8 + len(text) + end)
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(
    source: Source,
    out: str | os.PathLike[str],
    *,
    max_file_bytes: int = 5 * 10**9,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write a directory in the layout of Hugging Face: `model.safetensors`, or numbered files and their index.

    Args:
        source: What to write; use `Renamed` for a part of it, other names or another dtype.
        out: The directory; it appears when everything is in it.
        max_file_bytes: A file grows no larger, unless one tensor alone is.
        progress: Told of bytes written.

    Raises:
        ConfigError: `out` is there and not empty, or nothing is to be written, or the size of files is none.

    Memory: 64 MiB, whatever the sizes.
    """
    if type(max_file_bytes) is not int or max_file_bytes < 1:
        raise ConfigError(f"max_file_bytes: expected bytes >= 1, got {max_file_bytes!r}")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already; choose a new directory")
    if not source.tensors:
        raise ConfigError(f"{source.path}: no tensor to write; is there one that matches?")
    files = _share_out(source.tensors, max_file_bytes)
    hidden = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        hidden.mkdir(parents=True)
        where: dict[str, str] = {}
        for number, names in enumerate(files, 1):
            file = "model.safetensors"
            if len(files) > 1:
                file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            where |= dict.fromkeys(names, file)
            specs = {name: (source.tensors[name].dtype, source.tensors[name].shape) for name in names}
            write_safetensors_file(hidden / file, specs, _stream(source, names, progress), {"format": "pt"})
        if len(files) > 1:
            total = sum(described.nbytes for described in source.tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (hidden / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))
        if target.exists():
            target.rmdir()
        hidden.replace(target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return target


def _share_out(tensors: Mapping[str, Described], max_file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    room = max_file_bytes
    for name, described in tensors.items():
        if files[-1] and described.nbytes > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= described.nbytes
    return files


def _stream(
    source: Source, names: Iterable[str], progress: Callable[[int], None] | None
) -> Iterable[tuple[str, torch.Tensor]]:
    for name in names:
        for _, values in parts_of(source, name):
            yield name, values
            if progress is not None:
                progress(values.numel() * values.element_size())


class SafetensorsSource:
    """A directory in the layout of Hugging Face, or one file."""

    values: Any = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = Path(path)
        self.path = str(root)
        self.left_out: list[str] = []
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        found: dict[str, Described] = {}
        for file in [root] if root.is_file() else self._files(root):
            found |= self._described(file)
        self.tensors: Mapping[str, Described] = found

    def _described(self, file: Path) -> dict[str, Described]:
        found = {}
        try:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 - it is no dictionary
                part = handle.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(f"{file}: {name!r} has dtype {dtype}, which torch lacks")
                found[name] = Described(tuple(part.get_shape()), _DTYPES[dtype])
                self._where[name] = file
        except (SafetensorError, OSError) as error:
            raise CorruptError(f"{file}: {error}") from error
        return found

    def _files(self, root: Path) -> list[Path]:
        if (root / INDEX).exists():
            with reading(root / INDEX):
                names = sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values()))
                inside = [name for name in names if Path(name).name != name]
            if inside:
                raise CorruptError(f"{root / INDEX}: {inside[0]!r} is no name of a file beside it")
            return [root / name for name in names]
        found = sorted(root.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"{root}: no safetensors files")
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        handle = self._handle(self._where[name])
        try:
            values: torch.Tensor
            if box.sizes:
                ranges = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
                values = handle.get_slice(name)[ranges]
            else:
                values = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptError(f"{self._where[name]}: {name!r}: {error}") from error
        return values
