"""Parameters on the CPU: one call of the kernels for all of them.

In: rows and gradients. Out: parameters updated in place; the low-precision ones are written by the same pass that
updates their masters. Only a parameter whose elements do not fill a stretch of memory is copied, there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import accel_kernels as ak
import torch
from torch import Tensor

from .rows import Row, flat
from .steppers import Stepper


class HostStepper(Stepper):
    """Steps parameters that lie on the CPU."""

    def _prepare(self) -> None:
        # What the kernel writes in place of a parameter that is not dense.
        self._staged = {
            place: torch.empty_strided(row.param.shape, row.strides, dtype=row.param.dtype)
            for place, row in enumerate(self._rows)
            if not row.dense
        }
        # Rows whose gradient may lie in another order of memory than the row.
        self._unusual = [
            k for k, row in enumerate(self._rows) if not (row.dense and row.param.is_contiguous())
        ]
        params = [self._updated(place, row) for place, row in enumerate(self._rows)]
        states = [[flat(row.held[k]) for row in self._rows] for k in range(len(self._rule.states))]
        lows = [
            None if row.master is None else flat(self._staged.get(place, row.param))
            for place, row in enumerate(self._rows)
        ]
        self._table = ak.StepTable(self._rule.kind, params, states, low_precision=lows)

    def _updated(self, place: int, row: Row) -> Tensor:
        """The fp32 values that the kernel updates."""
        return flat(row.master if row.master is not None else self._staged.get(place, row.param))

    def _run(self, grads: Sequence[Tensor | None], segments: Sequence[Any], which: Sequence[int]) -> None:
        ready = [grad if grad is None or grad.is_contiguous() else grad.contiguous() for grad in grads]
        for place in self._unusual:
            grad, row = grads[place], self._rows[place]
            if grad is not None:
                ready[place] = flat(row.like(grad))
                if place in self._staged:
                    self._staged[place].copy_(row.param)
        self._table.step(ready, segments, which)
        for place, staged in self._staged.items():
            if grads[place] is not None:
                self._rows[place].param.copy_(staged)
