"""What this package raises: each error is also the builtin that a caller would expect."""


class AccelKernelsError(Exception):
    """Base of all errors of this package."""


class AccelValueError(AccelKernelsError, ValueError):
    """An argument's value is wrong: size, device, layout, overlap, hyper-parameter."""


class AccelTypeError(AccelKernelsError, TypeError):
    """An argument's type or dtype is wrong."""


class BackendUnavailableError(AccelKernelsError, RuntimeError):
    """The back end that was asked for cannot run here; the message says why."""


class TransferError(AccelKernelsError, OSError):
    """Bytes did not get to or from a file; the message names file, offset, bytes wanted and done, and why.

    ``errno`` is the system's number (``EIO`` for a file that ends too early), ``filename`` the file's path.
    """

    def __init__(self, code: int, text: str, path: str | None = None) -> None:
        super().__init__(code, text)
        self.filename = path

    def __str__(self) -> str:
        return str(self.strerror)
