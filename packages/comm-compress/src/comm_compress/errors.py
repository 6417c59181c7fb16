"""What this package raises: each error is also the builtin that a caller would expect."""


class CommCompressError(Exception):
    """Base of every error that this package raises on purpose."""


class CompressConfigError(CommCompressError, ValueError):
    """An argument that cannot be honoured; raised before anything travels."""


class CompressStateError(CommCompressError, RuntimeError):
    """Something that cannot be stepped or loaded as it is: a sparse gradient, a state of another shape."""
