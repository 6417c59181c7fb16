"""Hyper-parameters of runs of elements, and the coefficients that the kernels compute with.

A flat tensor holds many parameters, which may belong to different parameter groups. A segment names a run
``[start, stop)`` and its hyper-parameters. All derived numbers (bias corrections, step sizes) are computed
here, once, in double precision; kernels receive them rounded once to fp32. What each position means is
written at the ``coefficients`` method and at the kernel. Next: ``ops``.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .errors import AccelTypeError, AccelValueError

# csrc/include/accel/segment.h: int64 start, stop; float c[8]; uint32 flags, reserved.
_RECORD = struct.Struct("=qq8fII")
NUM_COEFFICIENTS = 8


class Optimizer(enum.IntEnum):
    """The fused optimizers, by the code that the kernels know them by."""

    ADAM = 0
    LION = 1
    ADAGRAD = 2
    SGD = 3


class Flag(enum.IntFlag):
    """Variants of an update rule; csrc/include/accel/segment.h."""

    L2 = 1
    MOMENTUM = 2
    FIRST = 4
    NESTEROV = 8


class Coefficients(NamedTuple):
    """What a kernel needs to know about a segment: at most eight numbers, and flags."""

    c: tuple[float, ...]
    flags: int


def _require(ok: bool, segment: object, field: str, expected: str) -> None:
    if not ok:
        given = getattr(segment, field)
        raise AccelValueError(f"{type(segment).__name__}.{field}: expected {expected}, got {given!r}")


def _non_negative(segment: object, *fields: str) -> None:
    for field in fields:
        value = getattr(segment, field)
        _require(value >= 0 and math.isfinite(value), segment, field, "a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class _Segment:
    start: int
    stop: int
    lr: float

    def __post_init__(self) -> None:
        for field in ("start", "stop"):
            _require(hasattr(getattr(self, field), "__index__"), self, field, "an integer")
        _require(self.start >= 0, self, "start", "an element index >= 0")
        _require(self.start <= self.stop, self, "stop", f"at least start = {self.start}")
        _non_negative(self, "lr")


@dataclass(frozen=True, kw_only=True)
class AdamSegment(_Segment):
    """AdamW (``decoupled``) or Adam with L2 regularization, for elements ``[start, stop)``.

    ``step`` counts from 1, need not be whole, and serves bias correction only. Sources: arXiv:1412.6980 algorithm 1,
    arXiv:1711.05101 algorithm 2.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    step: float
    decoupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.beta1 < 1, self, "beta1", "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, self, "beta2", "0 <= beta2 < 1")
        _non_negative(self, "eps", "weight_decay")
        _require(self.step >= 1, self, "step", "a count from 1")

    def coefficients(self) -> Coefficients:
        """``beta1, 1-beta1, beta2, 1-beta2, 1/sqrt(1-beta2^t), eps, lr/(1-beta1^t), decay or l2``.

        The last is the factor ``1 - lr * weight_decay``, or with flag L2 the weight decay itself.
        """
        correction1 = 1.0 - self.beta1**self.step
        correction2 = 1.0 - self.beta2**self.step
        l2 = self.weight_decay != 0 and not self.decoupled
        decay = self.lr * self.weight_decay if self.decoupled else 0.0
        return Coefficients(
            (
                self.beta1,
                1.0 - self.beta1,
                self.beta2,
                1.0 - self.beta2,
                1.0 / math.sqrt(correction2),
                self.eps,
                self.lr / correction1,
                self.weight_decay if l2 else 1.0 - decay,
            ),
            Flag.L2.value if l2 else 0,
        )


@dataclass(frozen=True, kw_only=True)
class LionSegment(_Segment):
    """Lion with decoupled weight decay, for elements ``[start, stop)``. Source: arXiv:2302.06675."""

    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.beta1 < 1, self, "beta1", "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, self, "beta2", "0 <= beta2 < 1")
        _non_negative(self, "weight_decay")

    def coefficients(self) -> Coefficients:
        """``beta1, 1-beta1, beta2, 1-beta2, lr, decay``."""
        decay = 1.0 - self.lr * self.weight_decay
        return Coefficients((self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.lr, decay), 0)


@dataclass(frozen=True, kw_only=True)
class AdagradSegment(_Segment):
    """Adagrad as ``torch.optim.Adagrad``, for elements ``[start, stop)``; ``step`` counts from 1.

    Source: Duchi, Hazan & Singer, JMLR 12 (2011).
    """

    lr_decay: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0
    step: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _non_negative(self, "lr_decay", "eps", "weight_decay")
        _require(self.step >= 1, self, "step", "a count from 1")

    def coefficients(self) -> Coefficients:
        """``lr/(1+(t-1)*lr_decay), eps, l2``."""
        step_size = self.lr / (1.0 + (self.step - 1) * self.lr_decay)
        flags = Flag.L2.value if self.weight_decay != 0 else 0
        return Coefficients((step_size, self.eps, self.weight_decay), flags)


@dataclass(frozen=True, kw_only=True)
class SgdSegment(_Segment):
    """SGD as ``torch.optim.SGD``, for elements ``[start, stop)``.

    ``first_step``: the momentum buffer holds nothing yet; it is set to the gradient (no dampening), as torch
    does.
    Source: Sutskever et al., ICML 2013, section 2.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    first_step: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _non_negative(self, "momentum", "weight_decay")
        _require(math.isfinite(self.dampening), self, "dampening", "a finite number")
        allowed = not self.nesterov or (self.momentum > 0 and self.dampening == 0)
        _require(allowed, self, "nesterov", "False unless momentum > 0 and dampening == 0")

    def coefficients(self) -> Coefficients:
        """``lr, momentum, 1-dampening, l2``."""
        flags = Flag.L2.value if self.weight_decay != 0 else 0
        if self.momentum != 0:
            flags |= Flag.MOMENTUM.value
            flags |= Flag.FIRST.value if self.first_step else 0
            flags |= Flag.NESTEROV.value if self.nesterov else 0
        return Coefficients((self.lr, self.momentum, 1.0 - self.dampening, self.weight_decay), flags)


Segment = AdamSegment | LionSegment | AdagradSegment | SgdSegment

_ZEROS = (0.0,) * NUM_COEFFICIENTS


def pack(segments: Sequence[Segment]) -> bytes:
    """The segments as 56-byte records, coefficients rounded to fp32.

    Raises:
        AccelValueError: a coefficient is beyond fp32's range.
    """
    records = []
    for segment in segments:
        c, flags = segment.coefficients()
        try:
            records.append(_RECORD.pack(segment.start, segment.stop, *c, *_ZEROS[len(c) :], flags, 0))
        except OverflowError:
            raise AccelValueError(f"a coefficient of {segment} is beyond fp32's range") from None
    return b"".join(records)


def check_segments(op: str, segments: Sequence[Segment], kind: type, numel: int) -> None:
    """Demand sorted, disjoint segments of one kind within ``[0, numel)``.

    Raises:
        AccelTypeError: an entry is not a ``kind``.
        AccelValueError: an entry reaches beyond the tensors or before the end of its predecessor.
    """
    end = 0
    for k, segment in enumerate(segments):
        if not isinstance(segment, kind):
            raise AccelTypeError(
                f"{op}: segments[{k}]: expected {kind.__name__}, got {type(segment).__name__}"
            )
        if segment.start < end:
            raise AccelValueError(
                f"{op}: segments[{k}]: expected a start >= {end}, the end of the segment before it "
                f"(sorted, disjoint), got {segment.start}"
            )
        end = segment.stop
    if end > numel:
        raise AccelValueError(f"{op}: segments[-1]: expected a stop <= {numel} elements, got {end}")
