"""One call under a checkpoint: what to run, and what it is run on again in backward.

In: a function and its arguments. Out: a `Region`, which torch's checkpoint calls twice, and the tensors that it saves
in between: inputs as they are, or what a `Holder` keeps instead of them. Tensors are found in nested tuples, lists and
dicts, in positional and keyword arguments alike; anything else is kept as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from .dense import Dense
from .holders import Holder, Kept
from .selective import selective_contexts

Back = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Place:
    """Where a saved tensor belongs among the arguments, and how it becomes what it was; None: it is that already."""

    leaf: int
    back: Back | None
    requires_grad: bool


@dataclass(frozen=True)
class _Shared:
    """An input that is kept already, for another checkpoint; the versions tell whether either has changed since."""

    version: int
    tensor: weakref.ref[torch.Tensor]
    tensor_version: int
    back: Back

    def unchanged(self, original: torch.Tensor) -> torch.Tensor | None:
        """What is kept, if it lives and still says what `original` does."""
        tensor = self.tensor()
        if tensor is None or (original._version, tensor._version) != (self.version, self.tensor_version):
            return None
        return tensor


class Keeper:
    """What a policy holds at run time: makes regions, and decides what of each is handed to the holder.

    An input of several checkpoints (a mask, an encoder's output) is kept once. Under a checkpoint of the same policy,
    inputs are left to that one: it drops them, and computes them again.

    Args:
        holder: keeps inputs; None: the graph keeps the inputs themselves.
        min_bytes: smaller inputs are always kept as they are.
        save_ops: ops whose outputs are saved, not computed again.
        check: called with the elements and the name of every input that is worth keeping, kept already or not, so that
            all ranks call it equally often.

    Attributes:
        depth: regions that are being run.
    """

    def __init__(
        self,
        holder: Holder | None,
        min_bytes: int,
        save_ops: Sequence[torch._ops.OpOverload],
        check: Callable[[torch.Tensor, str], None] | None = None,
    ) -> None:
        self.holder = holder
        self.save_ops = save_ops
        self.depth = 0
        self._min_bytes = min_bytes
        self._check = check
        self._shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._calls = 0

    def region(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> tuple[Callable[..., Any], list[torch.Tensor]]:
        """The region for one call of `fn`, and the tensors to save until it is run again."""
        self._calls += 1
        leaves, spec = tree_flatten((args, kwargs))
        places: list[_Place] = []
        saved: list[torch.Tensor] = []
        devices: set[torch.device] = set()
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if self._is_worth_it(leaf):
                kept = self._keep(leaf, f"'{name}'")
                places.append(_Place(index, kept.back, leaf.requires_grad))
                saved.append(kept.tensor)
                devices.add(leaf.device)
            else:
                places.append(_Place(index, None, leaf.requires_grad))
                saved.append(leaf)
        # Whose random state and autocast to restore, torch tells by the devices of what it saves.
        saved += [torch.empty(0, device=device) for device in devices if device.type != "cpu"]
        return Region(self, fn, leaves, spec, places), saved

    def trim(self) -> None:
        """Give back the memory that nothing is kept in."""
        if self.holder is not None:
            self.holder.trim()

    def _is_worth_it(self, tensor: torch.Tensor) -> bool:
        return (
            self.holder is not None
            and self.depth == 0
            and type(tensor) is torch.Tensor  # a parameter lives on anyway; other classes have their own ways
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            and tensor.numel() * tensor.element_size() >= self._min_bytes
            and not tensor.is_inference()
        )

    @torch.no_grad()
    def _keep(self, tensor: torch.Tensor, name: str) -> Kept:
        dense = Dense.of(tensor)
        if self._check is not None:
            self._check(dense.flatten(tensor), name)
        shared: _Shared | None = self._shared.get(tensor)
        found = None if shared is None else shared.unchanged(tensor)
        if shared is not None and found is not None:
            return Kept(found, shared.back)
        assert self.holder is not None
        kept = self.holder.keep(dense.flatten(tensor), name=name, call=self._calls)
        back = partial(_restore, dense, kept.back)
        self._shared[tensor] = _Shared(tensor._version, weakref.ref(kept.tensor), kept.tensor._version, back)
        return Kept(kept.tensor, back)


class Region:
    """A function with its arguments, to be run now and again in backward.

    Args:
        keeper: made it.
        fn: what to run.
        leaves: its arguments, flat.
        spec: how to unflatten them.
        places: of the tensors among them, in the order in which they are saved.
    """

    def __init__(
        self,
        keeper: Keeper,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: TreeSpec,
        places: Sequence[_Place],
    ) -> None:
        self.fn = fn
        self._keeper = keeper
        self._spec = spec
        self._places = places
        self._first: list[Any] | None = leaves
        tensors = {place.leaf for place in places}
        self._rest = [None if index in tensors else leaf for index, leaf in enumerate(leaves)]
        self._contexts = selective_contexts(keeper.save_ops)

    def __call__(self, *saved: torch.Tensor) -> Any:
        """Run it: the first time on the arguments themselves, later on what was saved of them."""
        first, self._first = self._first, None
        context = self._contexts[0 if first is not None else 1]
        args, kwargs = tree_unflatten(self._again(saved) if first is None else first, self._spec)
        self._keeper.depth += 1
        try:
            with context:
                return self.fn(*args, **kwargs)
        finally:
            self._keeper.depth -= 1

    @torch.no_grad()
    def _again(self, saved: Sequence[torch.Tensor]) -> list[Any]:
        leaves = list(self._rest)
        for place, tensor in zip(self._places, saved, strict=False):  # after them: marks of devices
            if place.back is not None:
                tensor = place.back(tensor).requires_grad_(place.requires_grad)
            leaves[place.leaf] = tensor
        return leaves


def _restore(dense: Dense, back: Back, kept: torch.Tensor) -> torch.Tensor:
    return dense.restore(back(kept))
