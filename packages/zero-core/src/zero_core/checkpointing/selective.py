"""Some ops' outputs are saved, the rest is computed again.

In: ops. Out: two contexts, around a function and around its recomputation. Torch's own contexts save and return the
outputs, and notice when one was changed in place; but they number every op that runs, and stop where the second run has
others than the first. It may have: a parameter that was whole in forward is gathered in backward. So only the ops that
were asked for come to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


def selective_contexts(ops: Sequence[torch._ops.OpOverload]) -> Contexts:
    """What is around a function when it is run first, and when it is run again."""
    if not ops:
        return nullcontext(), nullcontext()
    first, again = create_selective_checkpoint_contexts(list(ops))
    return _Only(ops, first), _Only(ops, again)


class _Only(TorchDispatchMode):
    """Shows another mode some ops, and lets the rest pass."""

    def __init__(self, ops: Sequence[torch._ops.OpOverload], mode: TorchDispatchMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._ops = frozenset(ops)
        self._mode = mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an op, or have it saved or returned."""
        if func in self._ops:
            return self._mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))
