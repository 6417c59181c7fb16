"""Which LoRA adapters requests may name: those that the engine has from the start, and those in a folder.

In: the folder that the server was given. Out: names, and where one is. Next: `prompts` knows the names, `loop` has the
engine load them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..errors import ConfigError

_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Adapter:
    """One in the folder.

    Attributes:
        stamp: of its files; another where they were replaced.
    """

    name: str
    directory: str
    stamp: tuple[int, ...]


class AdapterNames:
    """Adapters by name, each a model in the API.

    Args:
        loaded: those that the engine has.
        folder: each directory in it that is an adapter may be named, also one that comes later; None: no more.

    Raises:
        ConfigError: no such folder, or it has an adapter that is called as one of the others is.
    """

    def __init__(self, loaded: Sequence[str], folder: str | None) -> None:
        self._loaded = tuple(loaded)
        self._folder = folder
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"adapter_folder: expected a directory, got {folder!r}")
        twice = sorted(set(self._loaded) & set(self._in_folder()))
        if twice:
            raise ConfigError(
                f"adapter_folder: expected names beside those of the other adapters, got {twice[0]!r} in {folder}, "
                "too; call one of them otherwise"
            )

    def all(self) -> list[str]:
        """Those that may be named now."""
        return [*self._loaded, *sorted(set(self._in_folder()) - set(self._loaded))]

    def knows(self, name: str) -> bool:
        """Whether it may be named now."""
        return name in self._loaded or self.find(name) is not None

    def find(self, name: str) -> Adapter | None:
        """Where one is; None: the engine has it, or there is none."""
        return None if name in self._loaded else self._in(name)

    def _in(self, name: str) -> Adapter | None:
        """One of the folder; a name that could lead elsewhere is none."""
        if self._folder is None or name in ("", ".", "..") or os.path.basename(name) != name:
            return None
        directory = os.path.join(self._folder, name)
        with suppress(OSError, ValueError):  # no such file; a name that none can have
            files = [os.stat(os.path.join(directory, file)) for file in _FILES]
            stamp = tuple(part for each in files for part in (each.st_ino, each.st_mtime_ns, each.st_size))
            return Adapter(name, directory, stamp)
        return None

    def _in_folder(self) -> list[str]:
        names: list[str] = []
        if self._folder is not None:
            with suppress(OSError):  # it may have gone meanwhile
                names = os.listdir(self._folder)
        return [name for name in names if _is_text(name) and self._in(name) is not None]


def _is_text(name: str) -> bool:
    """Whether a file's name can be told a client."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
