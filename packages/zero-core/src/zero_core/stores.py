"""Where a rank's flat tensors rest: on the device, or in a store that another package supplies.

In: values that are not needed for a while, under a name. Out: the same values, where and when they are needed again.
A store is host memory, a drive, or anything that keeps bytes; `zero-offload-nvme` has both. Which tensors of a unit
rest in one is `Stores`' to say; `Resting` is one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .collectives import Handle
from .errors import ZeroConfigError


class ShardStore(Protocol):
    """Keeps flat tensors of one rank under names.

    What it raises, it raises from the call that meets the fault: an `OSError` that names what could not be kept.
    One with an attribute `is_lossy` that is true keeps approximations, and its `view` is a copy: see `Stores.frozen`.
    One with `reserve(name, numel, dtype)`, which makes a tensor of zeros, is asked for all shards' room before any
    value moves. One with `rewritten(name)` hears of a view that has been wholly written: what failed for that tensor
    before matters no more; unknown names are no error.
    """

    def put(self, name: str, values: torch.Tensor, start: int = 0) -> Handle:
        """Keep values, [n]: a new tensor, or elements `start` to `start + n` of one that is there.

        The values may be on any device, and must not change before the handle is done; nobody has to wait for it.
        """

    def fetch(self, name: str, out: torch.Tensor, start: int = 0) -> Handle:
        """Fill `out`, [n] on any device, with elements `start` to `start + n`."""

    def prefetch(self, name: str) -> None:
        """A `fetch` of all of it follows soon; a hint."""

    def forget(self, name: str) -> None:
        """No `fetch` will follow a `prefetch` after all."""

    def view(self, name: str) -> torch.Tensor:
        """The values as a CPU tensor for those who are in no hurry; what is written to it is kept."""

    def release(self, name: str) -> None:
        """Keep it no longer; unknown names are no error."""


@dataclass(frozen=True)
class Resting:
    """A tensor that rests in a store under a name."""

    store: ShardStore
    name: str

    @staticmethod
    def of(store: ShardStore, name: str, values: torch.Tensor) -> Resting:
        """Put values there, and wait until they are."""
        store.put(name, values).wait()
        return Resting(store, name)

    def view(self) -> torch.Tensor:
        """See `ShardStore.view`."""
        return self.store.view(self.name)


@dataclass(frozen=True, kw_only=True)
class Stores:
    """What of a model rests where; None: on the device.

    Attributes:
        params: shards of parameters (stage 3), in the parameters' dtype.
        frozen: those of parameters that are frozen when the model is sharded (stage 3), where not in `params`. May be
            lossy; a parameter that is unfrozen later starts from what has been kept of it.
        grads: reduced gradients (stages 2 and 3).
        optimizer: masters, where they are separate from the shards, and the optimizer's state (stages 1 to 3).
        optimizer_ratio: the part of the trainable elements, in whole units from the first, whose optimizer state goes
            to the store. Source: Twin-Flow, in DeepSpeed's ZeRO-Offload++ (2023).
        keep_first: what stays on the device is that of the units that are defined first, and whose gradients backward
            makes last: none of backward is left to hide a host's step of them. Source: SuperOffload (2026).
        prefix: comes before names, so that several models may share a store.
    """

    params: ShardStore | None = None
    frozen: ShardStore | None = None
    grads: ShardStore | None = None
    optimizer: ShardStore | None = None
    optimizer_ratio: float = 1.0
    keep_first: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.optimizer_ratio <= 1:
            raise ZeroConfigError(
                f"Stores(optimizer_ratio=...): expected 0 to 1, got {self.optimizer_ratio!r}"
            )
        for name, is_set in (("optimizer_ratio", self.optimizer_ratio != 1), ("keep_first", self.keep_first)):
            if is_set and self.optimizer is None:
                raise ZeroConfigError(
                    f"Stores({name}=...): it says which optimizer state goes to the store of the optimizer, and "
                    "optimizer is None; leave it out, or give Stores(optimizer=...)"
                )

    @staticmethod
    def of(store: ShardStore | Stores | None, stage: int) -> Stores:
        """One store for all that a stage shards, or what was said of each kind.

        Raises:
            ZeroConfigError: something that the stage does not shard is to rest in a store.
        """
        if store is None:
            return ON_DEVICE
        if not isinstance(store, Stores):
            kinds = [name for name, least in _FROM_STAGE.items() if stage >= least and name != "frozen"]
            store = Stores(**dict.fromkeys(kinds, store))  # type: ignore[arg-type]  # names of stores
        for name, least in _FROM_STAGE.items():
            if getattr(store, name) is not None and stage < least:
                raise ZeroConfigError(
                    f"Stores({name}=...): at stage {stage} every rank holds all of them; use stage {least} or above"
                )
            if name != "frozen" and is_lossy(getattr(store, name)):
                raise ZeroConfigError(
                    f"Stores({name}=...): {type(getattr(store, name)).__name__} keeps approximations, and only frozen "
                    "parameters may rest there: Stores(frozen=...)"
                )
        return store

    def of_units(self, sizes: Sequence[int]) -> list[Stores]:
        """For each unit: as here, without the optimizer's where `optimizer_ratio` leaves it on the device.

        Args:
            sizes: trainable elements.
        """
        near = replace(self, optimizer=None, optimizer_ratio=1.0, keep_first=False)
        left = self.optimizer_ratio * sum(sizes)
        found, is_full = [], False
        for size in reversed(sizes) if self.keep_first else sizes:
            fits = size <= left * (1 + 1e-9) and not is_full
            is_full = self.keep_first and not fits  # one defined before would be reduced after
            left -= size * fits
            found.append(self if fits else near)
        return found[::-1] if self.keep_first else found


def rewritten(store: ShardStore, name: str) -> None:
    """See `ShardStore`."""
    hear = getattr(store, "rewritten", None)
    if hear is not None:
        hear(name)


def is_lossy(store: ShardStore | None) -> bool:
    """Whether a store keeps approximations."""
    return bool(getattr(store, "is_lossy", False))


_FROM_STAGE = {"params": 3, "frozen": 3, "grads": 2, "optimizer": 1}

ON_DEVICE = Stores()
