"""Many tensors in one call: a table of their addresses, checked when it is made, stepped as if they were one.

A model is a list of parameters, and a call a parameter costs more than the arithmetic where they are small. In: lists
of tensors, once; their gradients and hyper-parameters, at each step. Out: the tensors, updated in place. Threads share
out the elements of all tensors together. Next: the back end of ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from . import checks
from .dispatch import choose, preferred
from .errors import AccelTypeError, AccelValueError
from .ops.common import mark_written
from .segments import AdagradSegment, AdamSegment, LionSegment, Optimizer, Segment, SgdSegment

# csrc/include/accel/segment.h: TableRow.
ROW = np.dtype(
    [
        *((name, "u8") for name in ("param", "grad", "state0", "state1", "low")),
        ("numel", "i8"),
        ("segment", "i4"),
        ("grad_dtype", "u1"),
        ("low_dtype", "u1"),
        ("reserved", "u2"),
    ]
)
_GRAD_DTYPES = set(checks.FLOATS)
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, None: 3}

# The optimizer that a kind of segment belongs to, and the numbers of states that it may have.
_KINDS: dict[type, tuple[Optimizer, tuple[int, ...]]] = {
    AdamSegment: (Optimizer.ADAM, (2,)),
    LionSegment: (Optimizer.LION, (1,)),
    AdagradSegment: (Optimizer.ADAGRAD, (1,)),
    SgdSegment: (Optimizer.SGD, (0, 1)),
}


class StepTable:
    """Tensors on the CPU that one call steps, of any number and size: parameter k with its states and copy.

    The same bits as a call of ``adam_step`` (``lion_step``, ...) for each of them. Making a table takes some 10 µs a
    tensor; a step about 0.4 µs a tensor beside the arithmetic. It holds the tensors, and copies nothing.

    Args:
        kind: ``AdamSegment``, ``LionSegment``, ``AdagradSegment`` or ``SgdSegment``: which optimizer.
        params: fp32, contiguous, any shapes; updated.
        states: one list for each state of the optimizer (Adam: first and second moments; SGD without momentum: none),
            each with a tensor a parameter: fp32, contiguous, of as many elements; updated.
        low_precision: bf16 or fp16 tensors that receive the updated parameters, or None; one entry a parameter.

    Raises:
        AccelTypeError: wrong type, dtype, or ``kind``.
        AccelValueError: lists of different lengths, sizes, devices, layout, overlap, read-only memory.
    """

    def __init__(
        self,
        kind: type[Segment],
        params: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        *,
        low_precision: Sequence[Tensor | None] | None = None,
    ) -> None:
        if kind not in _KINDS:
            raise AccelTypeError(f"StepTable: kind: expected one of the segment classes, got {kind!r}")
        self.kind = kind
        self._optimizer, num_states = _KINDS[kind]
        self._params = list(params)
        self._states = [list(state) for state in states]
        self._lows = [None] * len(self._params) if low_precision is None else list(low_precision)
        if len(self._states) not in num_states:
            raise AccelValueError(
                f"StepTable: states: expected {num_states[-1]} lists for {kind.__name__}, got {len(self._states)}"
            )
        for name, tensors in (
            *((f"states[{k}]", s) for k, s in enumerate(self._states)),
            ("low_precision", self._lows),
        ):
            if len(tensors) != len(self._params):
                raise AccelValueError(
                    f"StepTable: {name}: expected {len(self._params)} entries, one a parameter, got {len(tensors)}"
                )
        self._check()
        self._written = [t for t in (*self._params, *chain(*self._states), *self._lows) if t is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._written]
        self._numels = [param.numel() for param in self._params]
        self._spans = self._sorted_spans()
        self._rows = self._make_rows()
        self._grad_dtypes: list[torch.dtype] = []

    def __len__(self) -> int:
        """How many parameters there are."""
        return len(self._params)

    def is_current(self) -> bool:
        """Whether every tensor still lies where it lay when the table was made."""
        return [tensor.data_ptr() for tensor in self._written] == self._addresses

    def step(
        self,
        grads: Sequence[Tensor | None],
        segments: Sequence[Segment],
        which: Sequence[int],
        *,
        grad_scale: float = 1.0,
        backend: str | None = None,
    ) -> None:
        """Step every parameter that has a gradient.

        Args:
            grads: fp32, bf16 or fp16, contiguous, one a parameter with as many elements; None leaves it alone.
            segments: the hyper-parameters that occur; their ranges are not looked at.
            which: for each parameter, which of ``segments`` is its own (for one without a gradient: anything).
            grad_scale: multiplies every gradient.
            backend: as in ``adam_step``.

        Raises:
            AccelTypeError: wrong type or dtype.
            AccelValueError: sizes, devices, layout, overlap, an index out of range, or a tensor of the table that was
                given other memory since: make a new table.
            BackendUnavailableError: ``backend`` cannot run here.
        """
        if not self.is_current():
            raise AccelValueError(
                "StepTable: a tensor has other memory than when the table was made; make a new one"
            )
        if len(grads) != len(self) or len(which) != len(self):
            raise AccelValueError(
                f"StepTable: expected {len(self)} grads and as many entries of which, got {len(grads)} and {len(which)}"
            )
        for k, segment in enumerate(segments):
            if not isinstance(segment, self.kind):
                raise AccelTypeError(
                    f"StepTable: segments[{k}]: expected {self.kind.__name__}, got {type(segment).__name__}"
                )
            if isinstance(segment, SgdSegment) and segment.momentum and not self._states:
                raise AccelValueError(
                    f"StepTable: segments[{k}] has momentum, and the table has no state for it"
                )
        places = [k for k, grad in enumerate(grads) if grad is not None]
        if not places:
            return
        chosen = choose("StepTable", torch.device("cpu"), backend)
        rows = self._fill(places, [grad for grad in grads if grad is not None], which, len(segments))
        scale = float(grad_scale)
        if (backend or preferred("cpu")) == "cpu":
            from .backends import cpu

            cpu.step_table(self._optimizer, rows.tobytes(), segments, scale)
        else:
            for k in places:
                part = replace(segments[which[k]], start=0, stop=self._numels[k])
                states = [_flat(state[k]) for state in self._states]
                low = None if (copy := self._lows[k]) is None else _flat(copy)
                grad = _flat(cast(Tensor, grads[k]))
                chosen.step(self._optimizer, _flat(self._params[k]), grad, states, [part], scale, low)
        mark_written(*(self._params[k] for k in places), *(self._lows[k] for k in places))

    def _check(self) -> None:
        """Everything that one call of an op would demand, parameter by parameter; then that none shares memory."""
        for k, param in enumerate(self._params):
            roles: list[checks.Role] = [(f"params[{k}]", param, checks.SINGLE, True)]
            roles += [
                (f"states[{i}][{k}]", state[k], checks.SINGLE, True) for i, state in enumerate(self._states)
            ]
            if (low := self._lows[k]) is not None:
                roles.append((f"low_precision[{k}]", low, checks.HALVES, True))
            flat = [(name, _flat(t), dtypes, written) for name, t, dtypes, written in roles]
            checks.check_flat("StepTable", flat)
            if not param.is_cpu:
                raise AccelValueError(
                    f"StepTable: params[{k}]: expected a tensor on the CPU, got {param.device}"
                )
            if param.requires_grad and param.grad_fn is not None:
                raise AccelValueError(
                    f"StepTable: params[{k}]: is the result of a recorded operation; detach it first"
                )

    def _sorted_spans(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Begin and end addresses of what is written, in order of address."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._written]
        begins, lengths = np.array(self._addresses, np.uint64), np.array(sizes, np.uint64)
        begins, lengths = begins[lengths > 0], lengths[lengths > 0]
        order = np.argsort(begins)
        begins, ends = begins[order], (begins + lengths)[order]
        if (begins[1:] < ends[:-1]).any():
            raise AccelValueError("StepTable: expected memory of its own for every tensor, some share memory")
        return begins, ends

    def _make_rows(self) -> np.ndarray[Any, Any]:
        """The part of the table that stays."""
        rows = np.zeros(len(self), ROW)
        rows["param"] = [param.data_ptr() for param in self._params]
        for name, state in zip(("state0", "state1"), self._states, strict=False):
            rows[name] = [tensor.data_ptr() for tensor in state]
        rows["low"] = [0 if low is None else low.data_ptr() for low in self._lows]
        rows["low_dtype"] = [_CODES[None if low is None else low.dtype] for low in self._lows]
        rows["numel"] = self._numels
        return rows

    def _fill(
        self, places: list[int], grads: list[Tensor], which: Sequence[int], num_segments: int
    ) -> np.ndarray[Any, Any]:
        """The rows to step, with their gradients' addresses; one list a property: a step must not cost a call each."""
        everything = len(places) == len(self)
        rows = self._rows if everything else self._rows[places]
        numels = self._numels if everything else [self._numels[k] for k in places]
        if not all(isinstance(grad, Tensor) for grad in grads):
            self._refuse(places, grads)
        dtypes = [grad.dtype for grad in grads]
        if not (
            all(grad.is_cpu for grad in grads)
            and all(grad.layout is torch.strided and grad.is_contiguous() for grad in grads)
            and [grad.numel() for grad in grads] == numels
            and set(dtypes) <= _GRAD_DTYPES
        ):
            self._refuse(places, grads)
        chosen = which if everything else [which[k] for k in places]
        if min(chosen) < 0 or max(chosen) >= num_segments:
            raise AccelValueError(
                f"StepTable: which: expected indices into {num_segments} segments, got {chosen}"
            )
        rows["grad"] = [grad.data_ptr() for grad in grads]
        if not rows["grad"].all():
            self._refuse(places, grads)  # of no elements, or of elements without memory
        rows["segment"] = chosen
        if not everything or dtypes != self._grad_dtypes:
            rows["grad_dtype"] = [_CODES[dtype] for dtype in dtypes]
            self._grad_dtypes = dtypes if everything else []
        self._check_overlap(places, rows, grads)
        return rows

    def _refuse(self, places: list[int], grads: list[Tensor]) -> None:
        """Say which gradient is not as it should be."""
        for k, grad in zip(places, grads, strict=True):
            param = _flat(self._params[k])
            checks.check_flat(
                "StepTable",
                [
                    (f"params[{k}]", param, checks.SINGLE, True),
                    (f"grads[{k}]", _flat(grad), checks.FLOATS, False),
                ],
            )

    def _check_overlap(self, places: list[int], rows: np.ndarray[Any, Any], grads: list[Tensor]) -> None:
        """Gradients may share memory with each other, not with what is written."""
        begins, ends = self._spans
        if begins.size == 0:
            return
        first = rows["grad"]
        last = first + np.array([grad.numel() * grad.element_size() for grad in grads], np.uint64)
        before = np.searchsorted(begins, last) - 1  # the last of the written spans that begins before the end
        shared = (before >= 0) & (ends[before] > first) & (last > first)
        if shared.any():
            k = places[int(shared.argmax())]
            raise AccelValueError(
                f"StepTable: grads[{k}]: expected memory of its own, shares that of a written tensor"
            )


def _flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor's elements in a row; anything else as it is, for the checks to refuse."""
    fits = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.is_contiguous()
    return tensor.detach().view(-1) if fits else tensor
