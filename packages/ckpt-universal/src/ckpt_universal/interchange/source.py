"""What a format gives to a conversion, and a step as such a source."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..boxes import Box, cut, whole_box
from ..errors import CheckpointError, ConfigError, CorruptError
from ..reader import Want, read_into
from ..steps import Step
from ..values import DTYPES

PART_BYTES = 64 << 20
"""What a conversion holds of a tensor at once."""


@dataclass(frozen=True)
class Described:
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not all(type(size) is int and size >= 0 for size in self.shape):
            raise ValueError(f"shape {self.shape}: expected sizes >= 0")
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"{self.dtype!r} is no dtype")

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what takes a file apart: what fails because the file holds other things than it should is an error of it.

    Raises:
        CorruptError: names the file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CorruptError(
            f"{os.fspath(path)}: not laid out as it should be ({type(error).__name__}: {error})"
        ) from error


class Source(Protocol):
    """A checkpoint of some format.

    Attributes:
        path: for messages.
        tensors: what there is.
        values: a tree beside them, with `values.TensorRef` in place of tensors; None where the format has none.
        left_out: what could not be taken over, a line each.
    """

    path: str
    tensors: Mapping[str, Described]
    values: Any
    left_out: list[str]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part of a tensor, in its dtype, on the CPU."""


class StepSource:
    """A committed step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._index = step.index()
        self.path = step.directory.path
        self.step = self._index.step
        self.tensors: Mapping[str, Described] = {
            name: Described(record.shape, DTYPES[record.dtype])
            for name, record in self._index.tensors.items()
        }
        self.values = self._index.values
        self.left_out: list[str] = []

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        part = torch.empty(box.sizes, dtype=self.tensors[name].dtype)
        read_into(self._step.directory, self._index, [Want(name, [(box, part)])])
        return part


class Renamed:
    """Some of a source's tensors, under other names, in another dtype.

    Args:
        source: the source.
        only: pattern of names.
        rename: from a name to the new one.
        dtype: of floating-point tensors; None keeps each one's own.

    Raises:
        ConfigError: two tensors would have one name.
    """

    def __init__(
        self,
        source: Source,
        *,
        only: str = "*",
        rename: Callable[[str], str] = lambda name: name,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._source = source
        self._names: dict[str, str] = {}
        for name in source.tensors:
            if (
                fnmatch.fnmatchcase(name, only)
                and (first := self._names.setdefault(rename(name), name)) != name
            ):
                raise ConfigError(
                    f"{source.path}: {first!r} and {name!r} would both be called {rename(name)!r}; choose one of "
                    "them by 'only', or take another 'strip' or 'prefix'"
                )
        self._dtype = dtype
        self.path = source.path
        self.values = source.values
        self.left_out = source.left_out
        self.tensors: Mapping[str, Described] = {
            new: self._described(source.tensors[old]) for new, old in self._names.items()
        }

    def _described(self, own: Described) -> Described:
        if self._dtype is None or not own.dtype.is_floating_point:
            return own
        return Described(own.shape, self._dtype)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `Source`."""
        return self._source.read(self._names[name], box).to(self.tensors[name].dtype)


def parts_of(source: Source, name: str, most_bytes: int = PART_BYTES) -> Iterator[tuple[Box, torch.Tensor]]:
    """A tensor, part by part, in row-major order."""
    described = source.tensors[name]
    if described.nbytes:
        for box in cut(whole_box(described.shape), most_bytes // described.dtype.itemsize):
            yield box, source.read(name, box)
