"""What fastgen raises: each is a `FastgenError` and the builtin that fits."""

from __future__ import annotations


class FastgenError(Exception):
    """Any error of this package."""


class ConfigError(FastgenError, ValueError):
    """A setting or a sampling parameter is none, or contradicts another."""


class RequestError(FastgenError, ValueError):
    """A request cannot be served by this engine: too long, unknown adapter, malformed schema."""


class OverloadedError(FastgenError, RuntimeError):
    """The queue is full: try again later."""


class ModelError(FastgenError, ValueError):
    """A model directory is incomplete, damaged or of an unknown kind; names the tensor or key."""


class CacheError(FastgenError, RuntimeError):
    """There is no memory for the KV cache."""


class RankError(FastgenError, RuntimeError):
    """A process that shares the model has ended, or no longer says what the others say; names the rank."""
