"""Small values in the index: typed, nested, without pickle.

In: what a state tree holds beside tensors: None, numbers, text, bytes, lists, tuples, sets, dictionaries, dtypes, small
tensors; and `TensorRef`, which says that a tensor of that name belongs here. Out: msgpack, and back. What has no type
of its own there is an extension, see `Code`; an unknown one is refused, so nothing is ever built that is not listed.
"""

from __future__ import annotations

import enum
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from .errors import CheckpointError, ConfigError, CorruptError

MAX_DEPTH = 64
"""Of nested extensions, and of state trees."""
INLINE_BYTES = 16 << 20
"""A tensor in the index (of `PerRank`) may have so many bytes; larger ones belong in the tree."""

DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "float8_e8m0fnu", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64",
        "bool", "complex64", "complex128", "complex32",
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
}  # fmt: skip
"""Every dtype that can be stored, by the name it has in the index."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the index.

    Raises:
        ConfigError: it cannot be stored.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"tensors of {dtype} cannot be stored; there are {', '.join(DTYPES)}")
    return name


@dataclass(frozen=True)
class TensorRef:
    """In a tree of values: the tensor of this name belongs here."""

    name: str


@dataclass(frozen=True)
class PerRankValues:
    """In a tree of values: one value for each rank that saved."""

    values: tuple[Any, ...]


class Code(enum.IntEnum):
    """Extension types of the index."""

    TENSOR_REF = 1
    PER_RANK = 2
    TUPLE = 3
    SET = 4
    PAIRS = 5  # a dictionary whose keys are not all text
    BIG_INT = 6
    COMPLEX = 7
    DTYPE = 8
    TENSOR = 9  # dtype, shape, bytes
    COUNTER = 10


def pack(value: Any, where: str) -> bytes:
    """A value as msgpack.

    Args:
        value: see the module.
        where: its path, for the error.

    Raises:
        ConfigError: it is, or contains, something that has no type here.
    """
    packed: bytes = msgpack.packb(_plain(value, where, 0), use_bin_type=True)
    return packed


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: nested deeper than {MAX_DEPTH}; is it a cycle?")
    kind = type(value)
    if value is None or kind in (bool, float, str, bytes):
        return value
    if kind is int:
        if -(2**63) <= value < 2**64:
            return value
        return msgpack.ExtType(Code.BIG_INT, str(value).encode())
    if kind is TensorRef:
        return _plain_ref(value)

    def inner(each: Any, at: Any) -> Any:
        return _plain(each, f"{where}.{at}", depth + 1)

    def key_of(each: Any, at: str = "key") -> Any:
        _check_key(each, f"{where}.{at}")
        return inner(each, at)

    def extension(code: Code, content: Any) -> msgpack.ExtType:
        return msgpack.ExtType(code, msgpack.packb(content, use_bin_type=True))

    if isinstance(value, Mapping):
        if isinstance(value, Counter):
            return extension(Code.COUNTER, [[key_of(key), inner(n, key)] for key, n in value.items()])
        if all(type(key) is str for key in value):
            return {
                key: _plain_ref(each) if type(each) is TensorRef else inner(each, key)
                for key, each in value.items()
            }
        pairs = [[key_of(key), inner(each, key)] for key, each in value.items()]
        return extension(Code.PAIRS, pairs)
    if kind is list:
        return [inner(each, at) for at, each in enumerate(value)]
    if isinstance(value, tuple):
        return extension(Code.TUPLE, [inner(each, at) for at, each in enumerate(value)])
    if isinstance(value, (set, frozenset)):
        # By their bytes: equal sets are then equal on all ranks, whatever order their hashes give.
        elements = sorted((key_of(each, "element") for each in value), key=msgpack.packb)
        return extension(Code.SET, elements)
    if kind is PerRankValues:
        return extension(Code.PER_RANK, [inner(each, at) for at, each in enumerate(value.values)])
    if kind is complex:
        return msgpack.ExtType(Code.COMPLEX, struct.pack("<dd", value.real, value.imag))
    if isinstance(value, torch.dtype):
        return msgpack.ExtType(Code.DTYPE, dtype_name(value).encode())
    if isinstance(value, torch.Tensor):
        return extension(Code.TENSOR, _tensor(value, where))
    if isinstance(value, (bool, int, float, str, bytes)):  # of a class of its own, such as an enum or numpy's
        if isinstance(value, str):
            return str.__getitem__(value, slice(None))  # str() of an enum is its name
        for base in (bool, int, float, bytes):
            if isinstance(value, base):
                return _plain(base(value), where, depth)  # type: ignore[arg-type]  # it is one of them
    item = getattr(value, "item", None)  # numpy's numbers
    if callable(item) and getattr(value, "shape", None) == ():
        return _plain(item(), where, depth + 1)
    raise ConfigError(
        f"{where}: a {kind.__module__}.{kind.__qualname__} cannot be stored (nothing is pickled); give its state as "
        "tensors, numbers, text, lists and dictionaries, or give it state_dict() and load_state_dict()"
    )


def _check_key(value: Any, where: str) -> None:
    """Refuse what could not be a key, or an element of a set, when it comes back."""
    if isinstance(value, (tuple, frozenset)):
        for each in value:
            _check_key(each, where)
    elif isinstance(value, (Mapping, torch.Tensor, PerRankValues)):
        raise ConfigError(
            f"{where}: a {type(value).__qualname__} as a key or in a set cannot be stored; use text, numbers or tuples"
        )


def _plain_ref(ref: TensorRef) -> msgpack.ExtType:
    return msgpack.ExtType(Code.TENSOR_REF, ref.name.encode())


def _tensor(value: torch.Tensor, where: str) -> list[Any]:
    nbytes = value.numel() * value.element_size()
    if nbytes > INLINE_BYTES:
        raise ConfigError(
            f"{where}: a tensor of {nbytes} bytes inside PerRank; at most {INLINE_BYTES} fit in the index: give it to "
            "save() as a leaf of the tree"
        )
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [dtype_name(value.dtype), list(value.shape), bytes(flat.numpy())]


def unpack(packed: bytes, where: str) -> Any:
    """The value of `pack`.

    Raises:
        CorruptError: these are not bytes of `pack`.
    """
    try:
        return _unpack(packed, 0)
    except CheckpointError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        OverflowError,
        struct.error,
        msgpack.UnpackException,
        RuntimeError,
    ) as error:
        raise CorruptError(f"{where}: not a value of a checkpoint: {error}") from error


def _unpack(packed: bytes, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    return msgpack.unpackb(
        packed,
        raw=False,
        strict_map_key=True,
        ext_hook=lambda code, content: _extension(code, content, depth + 1),
    )


def _extension(code: int, content: bytes, depth: int) -> Any:
    kind = Code(code)
    if kind is Code.TENSOR_REF:
        return TensorRef(content.decode())
    if kind is Code.BIG_INT:
        return int(content.decode())
    if kind is Code.COMPLEX:
        return complex(*struct.unpack("<dd", content))
    if kind is Code.DTYPE:
        return DTYPES[content.decode()]
    inner = _unpack(content, depth)
    if not isinstance(inner, list):
        raise ValueError(f"{kind.name}: expected a list")
    if kind is Code.TUPLE:
        return tuple(inner)
    if kind is Code.SET:
        return set(map(_hashable, inner))
    if kind is Code.PAIRS:
        return {_hashable(key): value for key, value in inner}
    if kind is Code.COUNTER:
        return Counter({_hashable(key): count for key, count in inner})
    if kind is Code.PER_RANK:
        if not inner:
            raise ValueError("a value for each rank, and none at all")
        return PerRankValues(tuple(inner))
    name, shape, raw = inner
    return _tensor_of(name, shape, raw)


def _hashable(value: Any) -> Any:
    """What is to be a key, or an element of a set: sets in it are frozen, for they cannot have been anything else."""
    if isinstance(value, set):
        return frozenset(value)
    return tuple(map(_hashable, value)) if type(value) is tuple else value


def references(values: Any) -> Iterator[str]:
    """The names of the tensors that belong into a tree, with repetitions.

    Raises:
        ValueError: one is to be part of a key, of a set or of a rank's own value, where none can be; or it is nested
            deeper than any tree that can be packed.
    """
    left: list[tuple[Any, int, bool]] = [(values, 0, True)]
    while left:
        node, depth, allowed = left.pop()
        kind = type(node)
        if kind is TensorRef:
            if not allowed:
                raise ValueError(f"the tensor {node.name!r} cannot be a key, in a set, or one rank's")
            yield node.name
        elif isinstance(node, Mapping):
            left += [(each, depth + 1, allowed) for each in node.values()]
            left += [(key, depth + 1, False) for key in node if type(key) is not str]
        elif isinstance(node, (list, tuple)):
            left += [(each, depth + 1, allowed) for each in node]
        elif isinstance(node, (set, frozenset)):
            left += [(each, depth + 1, False) for each in node]
        elif kind is PerRankValues:
            left += [(each, depth + 1, False) for each in node.values]
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _tensor_of(name: str, shape: list[int], raw: bytes) -> torch.Tensor:
    dtype = DTYPES[name]
    if (
        any(type(size) is not int or size < 0 for size in shape)
        or len(raw) != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"tensor of {len(raw)} bytes, expected shape {shape} of {name}")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)
