"""One tensor that torch.save wrote, somewhere in a file, read in part: torch itself reads such a tensor whole.

In: a file and the range of it that is an archive of torch.save. Out: where the tensor's values lie, and any range of
them. What is not the plain case (contiguous, not compressed, little-endian) is left to torch.
Source: what torch.save writes: a zip archive with `data.pkl`, which names storages, and each storage as it is.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CorruptError
from .unpickle import Call

_PICKLE_BYTES = 1 << 20
_LOCAL_HEADER = struct.Struct("<26xHH")
_STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in a file.

    Attributes:
        path: the file.
        offset: where its values begin, in bytes.
        dtype, numel: of it.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    numel: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements of the flat tensor.

        Raises:
            CorruptError: the file ends before.
        """
        values = torch.empty(stop - start, dtype=self.dtype)
        view: memoryview = values.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            filled = 0
            while filled < len(view):
                taken = file.readinto(view[filled:])
                if not taken:
                    raise CorruptError(f"{self.path}: it ends before a tensor does")
                filled += taken
        return values


def find_stored(path: Path, offset: int, length: int) -> Stored | None:
    """Where the values of a tensor lie that torch.save wrote at an offset; None: torch must tell."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Span(file, offset, length)) as archive:
            return _find(path, file, offset, archive)
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        LookupError,
        TypeError,
        ValueError,
        OSError,
        struct.error,
    ):
        return None  # torch says what is wrong with it


def _find(path: Path, file: BinaryIO, offset: int, archive: zipfile.ZipFile) -> Stored | None:
    (name,) = (each for each in archive.namelist() if each.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")
    if archive.getinfo(name).file_size > _PICKLE_BYTES or archive.read(f"{folder}byteorder") != b"little":
        return None
    made = _Describing(io.BytesIO(archive.read(name))).load()
    if not isinstance(made, _Made):
        return None
    record = archive.getinfo(f"{folder}data/{made.key}")
    end = (made.start + made.numel) * made.dtype.itemsize
    if record.compress_type != zipfile.ZIP_STORED or not made.contiguous or end > record.file_size:
        return None
    file.seek(offset + record.header_offset)
    lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    begins = offset + record.header_offset + _LOCAL_HEADER.size + sum(lengths)
    return Stored(path, begins + made.start * made.dtype.itemsize, made.dtype, made.numel)


@dataclass(frozen=True)
class _Made:
    """What a pickle says of its tensor."""

    key: str
    start: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return self.start >= 0 and all(size >= 0 for size in self.sizes)


def _typed(storage: Any, start: int, sizes: Any, strides: Any, _grad: Any, _hooks: Any, *rest: Any) -> Any:
    """`torch._utils._rebuild_tensor_v2`; other arguments than these are left to torch."""
    dtype, key = storage
    return None if rest or dtype is None else _Made(key, start, dtype, tuple(sizes), tuple(strides))


def _untyped(
    storage: Any, start: int, sizes: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> Any:
    """`torch._utils._rebuild_tensor_v3`."""
    return None if rest else _Made(storage[1], start, dtype, tuple(sizes), tuple(strides))


_FUNCTIONS = {"_rebuild_tensor_v2": Call(_typed), "_rebuild_tensor_v3": Call(_untyped)}


class _Describing(pickle.Unpickler):
    """Makes no tensor, and says which one would be made."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in _FUNCTIONS:
            return _FUNCTIONS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, storage, key, _, _ = pid
        return _STORAGES[storage], str(key)


class _Span(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(view), self._length - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
