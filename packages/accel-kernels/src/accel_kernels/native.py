"""The compiled extension, if this installation has it: the only module that imports it.

``cpu`` is the extension module or ``None``; ``why_not`` then says why. Importing torch first makes the
extension share the OpenMP runtime that torch brings (both ask for ``libgomp.so.1``, and the loader gives one
copy for a name).
"""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  first, so that there is one OpenMP runtime in the process

cpu: ModuleType | None
why_not: str | None

try:
    from . import _cpu

    cpu, why_not = _cpu, None
except ImportError as error:
    missing = isinstance(error, ModuleNotFoundError) or "cannot import name" in str(error)
    cpu = None
    why_not = "extension not built: no C++ compiler when installed" if missing else f"extension: {error}"


def is_writable(address: int, num_bytes: int) -> bool:
    """Whether the first and last page of a buffer may be written; True where nobody can tell."""
    return cpu is None or bool(cpu.is_writable(address, num_bytes))
