"""One rank's tensors as a safetensors file: written as a stream, read piece by piece, checked by CRC-32.

In: named 1-D tensors. Out: a file and the checksum of every entry; and back. Writing holds one piece in memory
beside the tensors themselves, on the host, whatever device they are on.
Source: the safetensors format (8 bytes of header length, JSON header, raw little-endian data).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as JSON text."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of `dtype_name`.

    Raises:
        ValueError: For a name that is no dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Write 1-D contiguous tensors of any device, flushed to the disk.

    Returns:
        CRC-32 of each entry's bytes.

    Raises:
        CheckpointError: For a dtype that the format lacks.
    """
    specs = {key: (tensor.dtype, (tensor.numel(),)) for key, tensor in tensors.items()}
    return write_stream(path, specs, tensors.items())


def write_stream(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, int]:
    """Write tensors as they come, in any order; see `write`.

    Args:
        path: The file.
        specs: Dtype and shape of each, known beforehand.
        tensors: Each of them once.
    """
    header: dict[str, object] = {}
    starts: dict[str, int] = {}
    end = 0
    for key, (dtype, shape) in specs.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {key!r}: dtype {dtype} has no place in a safetensors file")
        starts[key], end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [starts[key], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums: dict[str, int] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors:
            data = as_bytes(tensor)
            checksums[key] = zlib.crc32(data)
            file.seek(8 + len(text) + starts[key])
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return checksums


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy where it is on the host."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class TensorFile:
    """Reads checked pieces from one file.

    Args:
        path: The file; it is opened at the first read.
        num_bytes: Its size when it was written.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._num_bytes = num_bytes
        self._open: safe_open | None = None

    def read(self, key: str, checksum: int, described: str) -> torch.Tensor:
        """One entry.

        Args:
            key: Its name in the file.
            checksum: CRC-32 of its bytes.
            described: What it holds, for errors.

        Raises:
            CheckpointError: If the file is missing, cut off or unreadable, or the bytes are not those written.
        """
        try:
            tensor: torch.Tensor = self._opened().get_tensor(key)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot read {described}: {error}; {_RESTORE}") from error
        found = zlib.crc32(as_bytes(tensor))
        if found != checksum:
            raise CheckpointError(
                f"{self.path}: {described} is damaged: checksum {found:08x}, expected {checksum:08x}; {_RESTORE}"
            )
        return tensor

    def _opened(self) -> safe_open:
        if self._open is None:
            try:
                size = self.path.stat().st_size
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.path}: missing; {_RESTORE}") from error
            if size != self._num_bytes:
                raise CheckpointError(
                    f"{self.path}: expected {self._num_bytes} bytes, got {size}: cut off or overwritten; {_RESTORE}"
                )
            self._open = safe_open(self.path, framework="pt")
        return self._open


_RESTORE = "restore the file, or load another tag"
