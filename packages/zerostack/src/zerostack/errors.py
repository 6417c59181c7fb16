"""What zerostack raises.

Every error says what was given, what was expected and what to do; nothing here is raised after a collective
has started on only some of the ranks. No module of the package comes before this one.
"""


class ZerostackError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ZerostackError, ValueError):
    """A configuration that cannot be honoured as written."""


class CheckpointError(ZerostackError, RuntimeError):
    """A checkpoint that cannot be written, or that is not what the program expects."""


class EngineStateError(ZerostackError, RuntimeError):
    """A call to the engine out of order, such as `step()` before any `backward()`."""
