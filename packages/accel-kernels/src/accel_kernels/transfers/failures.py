"""What the system says, as a ``TransferError`` that names the file, the bytes and what to do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import TransferError


def explain(path: str, code: int, doing: str) -> TransferError:
    """The error of a file.

    Args:
        path: the file.
        code: ``errno``; 0: the file ended where bytes were to be read.
        doing: what was going on, such as "reading 10 bytes at offset 0: 4 done".
    """
    cure = ""
    if doing.startswith("writing") or code == errno.ENOSPC:
        with suppress(OSError):
            cure = f"; {shutil.disk_usage(os.path.dirname(path) or '.').free} bytes are free there"
    if code == errno.ENOSPC:
        cure += "; make room, or choose another disk"
    elif code in (errno.EACCES, errno.EROFS, errno.EPERM):
        cure += "; choose a path that this process may use so"
    text = os.strerror(code) if code else "the file is shorter; nothing that was read may be used"
    return TransferError(code or errno.EIO, f"{path}: {doing}: {text}{cure}", path)


@contextmanager
def explained(path: str, doing: str) -> Iterator[None]:
    """Raises what the system says about a file as a ``TransferError``."""
    try:
        yield
    except OSError as error:
        raise explain(path, error.errno or errno.EIO, doing) from error
