"""What zerostack raises; what goes wrong with checkpoints, ckpt-universal says.

Every error says what was given, what was expected and what to do; nothing here but `LostRankError` is raised after a
collective has started on only some of the ranks. No module of the package comes before this one.
"""

from ckpt_universal import CheckpointError as CheckpointError


class ZerostackError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ZerostackError, ValueError):
    """A configuration that cannot be honoured as written."""


class EngineStateError(ZerostackError, RuntimeError):
    """A call to the engine out of order, such as `step()` before any `backward()`."""


class LostRankError(ZerostackError, RuntimeError):
    """Another rank has ended, or did not answer; the message names it."""
