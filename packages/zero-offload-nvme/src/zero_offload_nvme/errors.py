"""What this package raises: each error is also the builtin that a caller would expect."""


class OffloadError(Exception):
    """Base of every error that this package raises on purpose."""


class OffloadConfigError(OffloadError, ValueError):
    """An argument that cannot be honoured; raised before anything changes."""


class OffloadStateError(OffloadError, RuntimeError):
    """Something that cannot be stepped or loaded as it is: a sparse gradient, a state of another shape."""


class BindingError(OffloadError, RuntimeError):
    """Cores that cannot be had, or a system that binds none."""


class OffloadMemoryError(OffloadError, MemoryError):
    """Host memory, or what may be used of it, is full."""


class OffloadDiskError(OffloadError, OSError):
    """A drive cannot be used, or is full."""
