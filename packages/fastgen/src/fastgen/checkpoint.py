"""Tensors of a checkpoint by name, read piece by piece: from safetensors files, or from a module's state dict.

In: a directory or an `nn.Module`. Out: shapes, and slices of tensors, so that a rank reads only its part. Nothing is
unpickled. Next: `weights`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError


class Checkpoint(Protocol):
    """Named tensors."""

    where: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        ...

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A slice of a tensor, maybe a view of memory that others hold."""
        ...

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is such a view."""
        ...


class ModuleCheckpoint:
    """The tensors of a module, as its `state_dict` names them; reading makes no copies."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.where = where
        self._tensors = tensors
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A view."""
        return self._tensors[name].detach()[index]

    def holds(self, tensor: Tensor) -> bool:
        """Whether it has the memory of one of them."""
        return tensor.untyped_storage().data_ptr() in self._memory


class FileCheckpoint:
    """The tensors of a directory's safetensors files; a context manager, at whose end they are unmapped.

    Raises:
        ModelError: no files, a file that the index names is missing, or one is damaged; names it.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, Any] = {}
        self._names: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(folder):
            try:
                handle: Any = safe_open(path, framework="pt")
                names: list[str] = list(handle.keys())
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path}: expected a complete safetensors file, got {error}; fetch or save it again"
                ) from error
            self._files[str(path)] = handle
            self._names.update(dict.fromkeys(names, path))
            self._shapes.update(shapes)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        return self._shapes

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A copy of the slice."""
        path = self._names[name]
        try:
            tensor: Tensor = self._files[str(path)].get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path}: tensor {name!r} cannot be read: {error}; fetch the file again"
            ) from error
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        """No: what it reads is copied."""
        return False

    def __enter__(self) -> FileCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()  # unmaps them


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{index}: expected JSON with a weight_map, got {error!r}; fetch it again"
            ) from error
        for name in named:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{folder}: expected the file {name!r} that {index.name} names; fetch it")
        return [folder / name for name in named]
    whole = folder / "model.safetensors"
    found = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not found:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        advice = (
            f"{pickled[0]} is a pickle, which could run code: load it where you trust it and save_pretrained() it anew"
            if pickled
            else "give the directory that save_pretrained() wrote"
        )
        raise ModelError(f"{folder}: expected model.safetensors or its index, got none; {advice}")
    return found
