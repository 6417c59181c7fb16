"""The chosen rows of a unit on the device: values, moments, and the step over them.

In: a gradient shard. Out: updated rows in the shard of parameters. They are all that is stepped before `step` returns.
Next: `zenflow_unit` keeps them beside the full form of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import accel_kernels as ak
import torch
from zero_core import ShardSlot
from zero_core.steppers import FusedRule

from .row_set import RowSet


class CompactRows:
    """Chosen rows with their moments.

    Args:
        rows: which, and on which device.
        moments: in full form, flat; the rows' are taken from there.
        dtype: of the parameters.
        has_master: values are fp32 beside parameters of that dtype.

    Attributes:
        values: fp32, compact.
        grads: what `take_gradient` took.
    """

    def __init__(
        self, rows: RowSet, moments: Sequence[torch.Tensor], dtype: torch.dtype, has_master: bool
    ) -> None:
        self.rows = rows
        self.values = torch.empty(rows.numel, dtype=torch.float32, device=rows.device)
        self.grads = torch.empty_like(self.values)
        self._moments = [rows.take(full, torch.empty_like(self.values)) for full in moments]
        self._low = torch.empty_like(self.values, dtype=dtype) if has_master else None

    @property
    def published(self) -> torch.Tensor:
        """Values in the parameters' dtype, compact."""
        return self.values if self._low is None else self._low

    def take_gradient(self, grad: torch.Tensor) -> None:
        """The rows of a flat gradient, in its dtype."""
        if self.grads.dtype != grad.dtype:
            self.grads = torch.empty_like(self.grads, dtype=grad.dtype)
        self.rows.take(grad, self.grads)

    def take_values(self, master: torch.Tensor, shard: torch.Tensor) -> None:
        """The rows as flat tensors have them."""
        self.rows.take(master, self.values)
        if self._low is not None:
            self.rows.take(shard, self._low)

    def segments(self, slots: Sequence[ShardSlot], counts: Mapping[int, int], rule: FusedRule) -> list[Any]:
        """What steps the rows of these slots, with the hyper-parameters of this moment.

        Args:
            slots: that move.
            counts: slot -> how many steps it has taken with this one.
            rule: the optimizer's.
        """
        runs: list[tuple[int, int, dict[str, Any], int]] = []
        for slot in slots:
            index = slot.place.index
            count, (start, stop) = counts[index], self.rows.spans[index]
            if runs and runs[-1][1] == start and runs[-1][2] is slot.group and runs[-1][3] == count:
                start = runs.pop()[0]
            if start < stop:
                runs.append((start, stop, slot.group, count))
        return [rule.segment(*each) for each in runs]

    def step(self, segments: Sequence[Any], rule: FusedRule, scale: float) -> None:
        """Step them with what `take_gradient` took."""
        if segments:
            rule.run(self.values, self.grads, self._moments, segments, scale, self._low)

    def publish(self, shard: torch.Tensor) -> None:
        """Write the rows to the shard, in its dtype."""
        self.rows.put(self.published, shard)

    def write(self, moments: Sequence[torch.Tensor], master: torch.Tensor | None) -> None:
        """Write moments, and values where there is a separate master, to flat tensors."""
        for compact, full in zip(self._moments, moments, strict=True):
            self.rows.put(compact, full)
        if master is not None:
            self.rows.put(self.values, master)


def sum_of_squares(parts: Sequence[torch.Tensor]) -> float:
    """Of all elements, in fp64."""
    parts = [part for part in parts if part.numel()]
    return float(ak.grad_norm_scale(parts)[0]) if parts else 0.0
