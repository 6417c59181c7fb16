"""What this package raises: each error is also the builtin that a caller would expect."""


class AccelKernelsError(Exception):
    """Base of all errors of this package."""


class AccelValueError(AccelKernelsError, ValueError):
    """An argument's value is wrong: size, device, layout, overlap, hyper-parameter."""


class AccelTypeError(AccelKernelsError, TypeError):
    """An argument's type or dtype is wrong."""


class BackendUnavailableError(AccelKernelsError, RuntimeError):
    """The back end that was asked for cannot run here; the message says why."""
