"""What may be stored beside tensors: JSON's own types, so that a value comes back as it went in.

In: any value of a caller. Out: nothing, or a TypeError that names the path of the first value that would change.
`encode` and `decode` carry the few other types that schedules and optimizers keep in their state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

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


_TUPLE, _PAIRS, _COUNTER, _SCALAR = "$tuple", "$pairs", "$counter", "$scalar"


def encode(value: Any, path: str) -> Any:
    """State of a schedule or an optimizer as JSON: tuples, numbered dictionaries and scalar tensors are marked.

    Raises:
        TypeError: For anything else that JSON lacks; it names the path.
    """
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return {_SCALAR: [str(value.dtype).removeprefix("torch."), value.item()]}
    if isinstance(value, Mapping) and type(value) is not Counter and all(type(key) is str for key in value):
        return {key: encode(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Mapping):
        mark = _COUNTER if isinstance(value, Counter) else _PAIRS
        return {mark: [[encode(key, path), encode(item, f"{path}[{key!r}]")] for key, item in value.items()]}
    check_json(value, path)
    return value


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tuple": items}:
            return tuple(decode(items))
        case {"$scalar": [dtype, number]}:
            return torch.tensor(number, dtype=getattr(torch, dtype))
        case {"$counter": pairs}:
            return Counter({decode(key): decode(item) for key, item in pairs})
        case {"$pairs": pairs}:
            return {decode(key): decode(item) for key, item in pairs}
    return {key: decode(item) for key, item in value.items()}
