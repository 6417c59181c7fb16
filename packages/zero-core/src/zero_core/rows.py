"""Sparse gradients of embeddings: only the rows that a batch has touched travel.

In: an embedding's sparse gradient, from `hooks`. Out: the mean over ranks in this rank's slice, dense, as `accumulate`
keeps it: the optimizer's state is a slice too. Which rows a rank touches is its own business, so ranks agree on sizes
first.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .buckets import BufferPool, GradBucket
from .collectives import Wire
from .flat_unit import FlatUnit


class RowBucket(GradBucket):
    """The local gradient of a unit that is one embedding's weight: rows, and no dense buffer."""

    def __init__(self, unit: FlatUnit, dtype: torch.dtype, pool: BufferPool) -> None:
        super().__init__(unit, dtype, pool)
        self._grad: torch.Tensor | None = None

    def land(self, index: int, grad: torch.Tensor, *, overwrite: bool = False) -> None:
        """Add a gradient, [rows, width], sparse by rows; a dense one counts as one that touches all rows."""
        grad = (grad if grad.is_sparse else grad.to_sparse(1)).to(self.dtype)
        self._grad = (grad if self._grad is None else self._grad + grad).coalesce()
        self.this_pass.add(index)
        self.used.add(index)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers [n] int64, ascending, and their gradients [n, width]; the bucket is empty then."""
        grad, self._grad = self._grad, None
        if grad is None:
            device, width = self.unit.device, self.unit.layout.slots[0].shape[1]
            return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(
                0, width, dtype=self.dtype, device=device
            )
        return grad.indices()[0], grad.values()

    def zero(self, *, free: bool) -> None:
        """Forget all contributions."""
        self._grad = None
        self.this_pass.clear()
        self.used.clear()

    def zero_slots(self, slots: Iterable[int]) -> None:
        """Forget the contributions of some slots."""
        if 0 in set(slots):
            self.zero(free=True)


@torch.no_grad()
def reduce_rows(bucket: RowBucket, out: torch.Tensor, everyone: Wire) -> None:
    """Write this rank's part of the mean over all ranks; every rank calls it.

    Args:
        bucket: with the rows that this rank has touched.
        out: [local numel], overwritten. Sums are formed in rank order, in at least fp32, and rounded once.
        everyone: all ranks, in the order of their shards (again and again, where there are replicas).

    On the wire: each touched row to each rank that holds a part of it (one, mostly, in each set of replicas).
    """
    layout, size, own = bucket.unit.layout, everyone.group.size(), everyone.group.rank()
    width = layout.slots[0].shape[1]
    rows, values = bucket.take()
    bounds = [_rows_of(bucket.unit, rank % layout.world_size, width) for rank in range(size)]
    edges = (
        torch.searchsorted(rows, torch.tensor(bounds, device=rows.device).flatten()).view(size, 2).tolist()
    )

    name = f"touched rows of {bucket.unit.label}"
    counts = [torch.tensor([stop - start], device=rows.device) for start, stop in edges]
    incoming = [torch.zeros_like(count) for count in counts]
    incoming[own] = counts[own]
    everyone.swap(f"number of {name}", counts, incoming).wait()
    number = [int(count) for count in incoming]

    sent_rows, sent_values = ([of[start:stop].contiguous() for start, stop in edges] for of in (rows, values))
    got_rows = [sent_rows[r] if r == own else rows.new_empty(n) for r, n in enumerate(number)]
    got_values = [sent_values[r] if r == own else values.new_empty(n, width) for r, n in enumerate(number)]
    pending = everyone.swap(name, sent_rows, got_rows)
    everyone.swap(f"gradients of {name}", sent_values, got_values).wait()
    pending.wait()

    wide = torch.promote_types(out.dtype, torch.float32)
    total = out.zero_() if out.dtype == wide else torch.zeros_like(out, dtype=wide)
    start = bucket.unit.local[0]
    for r in range(size):
        _add_rows(total, start, got_rows[r], got_values[r].to(wide))
    total.mul_(1.0 / size)
    if total is not out:
        out.copy_(total)


def _rows_of(unit: FlatUnit, shard: int, width: int) -> tuple[int, int]:
    """The rows of which a shard holds something (at stage 0: all)."""
    start, stop = (0, unit.layout.slots[0].numel) if unit.stage == 0 else unit.layout.shard_range(shard)
    return start // width, -(-min(stop, unit.layout.slots[0].numel) // width)


def _add_rows(total: torch.Tensor, start: int, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Add rows to elements `[start, start + len)` of the flattened weight; those at the two edges may lie in part."""
    width = values.shape[1]
    first = -(-start // width)  # the first row that begins inside
    head = min(first * width - start, total.numel())
    num_whole = (total.numel() - head) // width
    whole = (rows >= first) & (rows < first + num_whole)
    total[head : head + num_whole * width].view(-1, width).index_add_(0, rows[whole] - first, values[whole])
    for row, value in zip(rows[~whole].tolist(), values[~whole], strict=True):
        lo, hi = max(row * width, start), min((row + 1) * width, start + total.numel())
        total[lo - start : hi - start] += value[lo - row * width : hi - row * width]
