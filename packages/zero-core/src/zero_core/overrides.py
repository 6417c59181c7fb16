"""Methods of the user's modules that mean something else once a model is sharded, until it is no more.

In: a module and what to call instead of one of its methods. Out: an attribute of that very module, and what was there
before it when `restore` is called. A wrapper that is dropped is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


class Overrides:
    """Puts methods on single modules, and takes them off again."""

    def __init__(self) -> None:
        self._before: WeakKeyDictionary[nn.Module, dict[str, dict[str, Any]]] = WeakKeyDictionary()

    def set(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        """Have `module.<name>` be `method`; no effect if it was set before."""
        before = self._before.setdefault(module, {})
        if name not in before:
            before[name] = {name: module.__dict__[name]} if name in module.__dict__ else {}
            module.__dict__[name] = method

    def restore(self) -> None:
        """Give every module its own methods back."""
        for module, before in self._before.items():
            for name, own in before.items():
                module.__dict__.pop(name, None)
                module.__dict__.update(own)
        self._before.clear()
