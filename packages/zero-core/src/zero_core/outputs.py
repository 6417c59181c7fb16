"""What a module returns: the tensors in it through which a backward pass can come."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def tensors_needing_grad(output: Any) -> tuple[list[torch.Tensor], bool]:
    """The tensors in a module's output through which a backward can come, and whether we saw all of it."""
    found, understood, seen = [], True, set()
    pending = tree_leaves(output)
    while pending:
        leaf = pending.pop()
        if isinstance(leaf, torch.Tensor):
            if leaf.requires_grad and leaf.grad_fn is not None:
                found.append(leaf)
        elif isinstance(leaf, (tuple, list, set, frozenset)):
            pending += tree_leaves(list(leaf))  # such as a torch.Size
        elif not isinstance(leaf, _PLAIN) and not _is_array_of_numbers(leaf):
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if is_dataclass(leaf) and not isinstance(leaf, type):
                pending += tree_leaves([getattr(leaf, field.name) for field in fields(leaf)])
            elif hasattr(leaf, "__dict__"):
                pending += tree_leaves(list(vars(leaf).values()))
            else:
                understood = False
    return found, understood


_PLAIN = (
    *(int, float, str, bool, bytes, complex, range, slice, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _is_array_of_numbers(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return type(leaf).__module__ == "numpy" and dtype is not None and not dtype.hasobject
