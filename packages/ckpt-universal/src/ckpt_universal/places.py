"""A path or a URL -> the directory that it names."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError
from .local_store import LocalDirectory
from .remote_store import RemoteDirectory
from .stores import Directory


def open_directory(path: str | os.PathLike[str]) -> Directory:
    """The directory at a path, or under a URL that fsspec understands.

    Raises:
        ConfigError: it is a URL, and fsspec is not installed or does not know it.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        return LocalDirectory(Path(text.removeprefix("file://")))
    if "://" not in text:
        return LocalDirectory(Path(text))
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(
            f"{text}: remote paths need fsspec; pip install 'ckpt-universal[remote]'"
        ) from error
    try:
        system, inner = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{text}: {error}") from error
    return RemoteDirectory(system, inner.rstrip("/"), text.rstrip("/"))
