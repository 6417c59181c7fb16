"""The errors of this package: each is a `ZeroError` and the builtin a caller would expect."""


class ZeroError(Exception):
    """Base of every error that this package raises on purpose."""


class ZeroConfigError(ZeroError, ValueError):
    """An argument that cannot be honoured; raised before any collective and before anything changes."""


class ZeroStateError(ZeroError, RuntimeError):
    """A call at a time when it cannot work (an illegal transition, a model that is not sharded)."""


class ReleasedParameterError(ZeroError, RuntimeError):
    """The values of a stage 3 parameter were touched while they rest as shards."""


class CollectiveError(ZeroError, RuntimeError):
    """A collective failed or did not finish in time; the message names the unit and the ranks."""
