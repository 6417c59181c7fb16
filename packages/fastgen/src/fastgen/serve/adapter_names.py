"""Which LoRA adapters requests may name: those that the engine has from the start, and those in a folder.

In: the folder that the server was given. Out: names, and the directory of one. A name that a request brings is compared
with what the folder holds, and never made part of a path. Next: `prompts` knows the names, `service` has them loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from ..errors import ConfigError

_MARK = "adapter_config.json"


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
        twice = sorted(set(self._loaded) & self._found().keys())
        if twice:
            raise ConfigError(
                f"adapter_folder: expected names beside those of the other adapters, got {twice[0]!r} in {folder}, "
                "too; call one of them otherwise"
            )

    def all(self) -> list[str]:
        """Those that may be named now."""
        return [*self._loaded, *sorted(self._found().keys() - set(self._loaded))]

    def directory(self, name: str) -> str | None:
        """Where to load one from; None: the engine has it, or it is there no longer."""
        return None if name in self._loaded else self._found().get(name)

    def _found(self) -> dict[str, str]:
        if self._folder is None:
            return {}
        found = {}
        with suppress(OSError), os.scandir(self._folder) as entries:  # it may have gone meanwhile
            for entry in entries:
                if os.path.isfile(os.path.join(entry.path, _MARK)):
                    found[entry.name] = entry.path
        return found
