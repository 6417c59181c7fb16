"""What can go wrong, each with a type that is also the builtin one would expect."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """Something is wrong with a checkpoint, or with writing one."""


class CorruptError(CheckpointError):
    """Bytes of a checkpoint are not those that were written; the message names file and tensor."""


class MismatchError(CheckpointError, ValueError):
    """A checkpoint and the state it is to be loaded into do not fit; nothing was changed."""


class NotACheckpointError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint at this path."""


class BusyError(CheckpointError):
    """Another run is writing this very checkpoint."""


class ConfigError(CheckpointError, ValueError):
    """An argument has a value that cannot be honoured."""
