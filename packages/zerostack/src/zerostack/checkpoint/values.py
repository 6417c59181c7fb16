"""What may be stored beside tensors: JSON's own types, so that a value comes back as it went in.

In: any value of a caller. Out: nothing, or a TypeError that names the path of the first value that would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN = (str, bool, int, float, type(None))


def check_json(value: Any, path: str) -> None:
    """Make sure that a value survives JSON unchanged.

    Raises:
        TypeError: With the path of the offending value and what to do.
    """
    if type(value) in _PLAIN:
        return
    if type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]")
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{path}: a key must be a str, got {key!r} ({type(key).__name__})")
            check_json(item, f"{path}.{key}")
        return
    raise TypeError(f"{path}: {_advice(value)}")


def _advice(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, tuple | set | frozenset):
        return f"a {name} would come back as a list; pass list(value)"
    if name in {"Tensor", "Parameter"}:
        return "a tensor is not a small value; register it as a buffer of the model, or pass value.tolist()"
    if hasattr(value, "item"):
        return f"a {name} is not a JSON value; pass value.item() or value.tolist()"
    return f"expected str, int, float, bool, None, list or dict with str keys, got {name}"
