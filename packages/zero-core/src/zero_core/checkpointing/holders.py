"""Where a checkpoint's inputs wait for its backward.

In: the flat elements of an input. Out: `Kept`: a tensor that the autograd graph holds instead, and the way back. A
`Holder` keeps no reference to what it hands out: the graph decides how long that lives. `Copies` is the plain one;
`partition`, `host` and `arena` follow.

Note [Lent memory]
Code under a checkpoint may hold on to its input, or to a view of it, for as long as it likes. So a piece of a buffer
is lent as a tensor with a storage of its own, and is free again when that storage dies: when no tensor looks at it any
more, in whatever order. PyTorch keeps a storage's Python object as long as the storage, so a finalizer is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

ALIGN_BYTES = 64
"""A cache line, and what vector instructions ask for."""


@dataclass(frozen=True)
class Kept:
    """What is kept instead of an input.

    Attributes:
        tensor: for the graph to hold; its values must not change.
        back: from `tensor` to the flat elements. Knows nothing of this very tensor: under an outer checkpoint the inner
            one's is computed again, and `back` gets the new one.
    """

    tensor: torch.Tensor
    back: Callable[[torch.Tensor], torch.Tensor]


class Holder(Protocol):
    """A way of keeping inputs."""

    def keep(self, flat: torch.Tensor, *, name: str, call: int) -> Kept:
        """Keep a copy of `flat`, [numel], of which a view may be all that the caller holds.

        Args:
            flat: the elements.
            name: what they are, for messages.
            call: number of the checkpoint; inputs of one come with one number, later ones with higher numbers.
        """

    def trim(self) -> None:
        """Give back the memory that nothing is kept in."""


class Copies:
    """Copies, each in memory of its own, on the device where the input is."""

    def keep(self, flat: torch.Tensor, *, name: str, call: int) -> Kept:
        """See `Holder.keep`."""
        return Kept(flat.clone(), itself)

    def trim(self) -> None:
        """Nothing is held."""


def itself(kept: torch.Tensor) -> torch.Tensor:
    """The way back from elements that were kept as they are."""
    return kept


def lend(
    buffer: torch.Tensor, start: int, numel: int, dtype: torch.dtype, returned: Callable[[], object]
) -> torch.Tensor:
    """A tensor over a part of `buffer`, and word when its memory is free again; see Note [Lent memory].

    Args:
        buffer: bytes, [n]; lives as long as what is lent of it.
        start: first byte.
        numel: elements, at least one.
        dtype: of the tensor.
        returned: called when nothing looks at the memory any more, on any thread, in the middle of anything.
    """
    storage = buffer.untyped_storage()[start : start + numel * dtype.itemsize]
    weakref.finalize(storage, returned).atexit = False
    return torch.empty(0, dtype=dtype, device=buffer.device).set_(storage, 0, (numel,), (1,))
