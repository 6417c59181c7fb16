"""Inputs that all ranks of a group hold alike: each keeps 1/N, and gathers the rest in backward.

In: flat elements, equal on all ranks. Out: this rank's slice, kept by another holder; the way back is one all-gather,
launched by every rank as its backward comes to the checkpoint. The bytes travel by `collectives`.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist

from ..collectives import PlainCollectives, Wire
from ..errors import ZeroStateError
from .holders import Holder, Kept


class Partition:
    """Keeps one rank's slice of each input.

    Args:
        group: ranks on which the inputs are identical (tensor or sequence parallel).
        inner: keeps the slice.
        timeout_s: deadline of a gather on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup, inner: Holder, timeout_s: float) -> None:
        self.group = group
        self.inner = inner
        self.timeout_s = timeout_s
        self._wires: dict[torch.device, Wire] = {}

    def keep(self, flat: torch.Tensor, *, name: str, call: int) -> Kept:
        """See `Holder.keep`; keeps ceil(numel / N) elements."""
        rank, size = self.group.rank(), self.group.size()
        share = -(-flat.numel() // size)
        part = flat[rank * share : (rank + 1) * share]
        if part.numel() < share:
            part = torch.cat([part, part.new_zeros(share - part.numel())])
        kept = self.inner.keep(part, name=name, call=call)
        return Kept(kept.tensor, partial(self._gather, kept, flat.numel(), name))

    def trim(self) -> None:
        """See `Holder.trim`."""
        self.inner.trim()
        for wire in self._wires.values():
            wire.collectives.trim()

    def _gather(self, kept: Kept, numel: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One collective: all elements from the ranks' slices."""
        part = kept.back(tensor)
        full = part.new_empty(part.numel() * self.group.size())
        self._wire(part.device).gather(f"kept inputs of {name}", part, full).wait()
        return full[:numel]

    def check_alike(self, flat: torch.Tensor, name: str) -> None:
        """Compare a checksum over the group: one collective of 3 N numbers.

        Raises:
            ZeroStateError: the ranks hold different values.
        """
        sums = torch.zeros(self.group.size(), 3, dtype=torch.int64, device=flat.device)
        sums[self.group.rank(), 0] = flat.numel()
        sums[self.group.rank(), 1:] = _checksum(flat)
        wire = self._wire(flat.device)
        wire.all_reduce(f"checksum of the inputs of {name}", sums, dist.ReduceOp.SUM).wait()
        others = [rank for rank, row in enumerate(sums.tolist()) if row != sums[0].tolist()]
        if others:
            raise ZeroStateError(
                f"CheckpointPolicy(partition=...): expected inputs of {name} that are identical on the "
                f"{self.group.size()} ranks of the group, got other values on rank(s) {', '.join(map(str, others))} "
                f"than on rank 0 (this is rank {self.group.rank()}); partition over tensor or sequence parallel ranks, "
                "which compute with the same batch, or leave partition out"
            )

    def _wire(self, device: torch.device) -> Wire:
        if device not in self._wires:
            collectives = PlainCollectives(self.group, self.timeout_s)
            self._wires[device] = Wire(self.group, collectives, device, self.timeout_s)
        return self._wires[device]


def _checksum(flat: torch.Tensor) -> torch.Tensor:
    """Two int64 numbers, [2], that tell where which bits are: sums of the rows and of the columns of a square.

    Each row and each column has a random weight: two sums of all elements, instead of a weight for each element.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    values = flat.contiguous().view(words).long()
    width = math.isqrt(values.numel()) or 1
    rows, rest = divmod(values.numel(), width)
    square, last = values[: rows * width].view(rows, width), values[rows * width :]
    of_columns = square.sum(0)
    of_columns[:rest] += last
    of_rows = torch.cat([square.sum(1), last.sum().view(1)])
    same_everywhere = torch.Generator().manual_seed(0)
    weights = torch.randint(2**62, (rows + 1 + width,), generator=same_everywhere).to(flat.device)
    return torch.stack([(of_rows * weights[: rows + 1]).sum(), (of_columns * weights[rows + 1 :]).sum()])
