"""A tensor's elements as one flat run in the order in which they lie in memory, and back.

In: a strided tensor of any layout. Out: a flat tensor (a view where there are no gaps) and a `Dense` that restores
shape and order of dims, so that kernels which choose their way by strides see the same in forward and recompute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Dense:
    """How to see flat elements as the tensor they came from.

    Attributes:
        shape: of the tensor.
        order: its dims from the slowest to the fastest in memory.
        sizes: of the elements kept, in that order; 1 where the tensor was expanded.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Dense:
        """Describe `tensor`."""
        order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
        sizes = tuple(1 if tensor.stride(dim) == 0 else tensor.shape[dim] for dim in order)
        return Dense(tuple(tensor.shape), order, sizes)

    def flatten(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements, [numel]: expanded ones once, gaps left out."""
        permuted = tensor.permute(self.order)
        for dim, size in enumerate(self.sizes):
            permuted = permuted.narrow(dim, 0, size)
        return permuted.reshape(-1)

    def restore(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor again, a view of `flat`."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.view(self.sizes).permute(back).expand(self.shape)
