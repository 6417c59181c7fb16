"""The policies a user hands to `shard`: which dtype each thing has, and how much may be in flight.

Frozen, keyword-only, validated on construction. Nothing here touches a tensor's values or a process group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import ZeroConfigError
from .units import UnitChoice

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The five dtypes of mixed-precision training; `None` means "as the line before it".

    Args:
        compute: dtype of the forward and backward maths; floating-point inputs of the model are cast to it.
            `None`: whatever the parameters have.
        param: dtype of the parameters as the model sees them, and of their bytes on the wire. `None`: `compute`.
            Where both are given and differ, forward runs under `torch.autocast(compute)`.
        reduce: dtype of the full gradient buffer of a unit, and of gradients on the wire. `None`: the parameter's.
        accumulate: dtype of the reduced gradients kept from one backward to the next. `None`: `reduce`.
        master: dtype of the copy that the optimizer updates; where it equals the parameter's dtype there is no
            copy and the shard itself is updated. `None`: fp32, or the parameter's own where that is wider.

    Raises:
        ZeroConfigError: a dtype that is not floating-point, or a `compute` autocast cannot provide.

    Source: Micikevicius et al., Mixed Precision Training (2018), section 3; ZeRO (2020), section 3.1.
    """

    compute: torch.dtype | None = None
    param: torch.dtype | None = None
    reduce: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    master: torch.dtype | None = None

    def __post_init__(self) -> None:
        for field in ("compute", "param", "reduce", "accumulate", "master"):
            dtype = getattr(self, field)
            if dtype is not None and dtype not in FLOAT_DTYPES:
                raise ZeroConfigError(
                    f"Precision({field}=...): expected one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype!r}"
                )
        if self.autocast and self.compute not in (torch.bfloat16, torch.float16):
            raise ZeroConfigError(
                f"Precision(param={self.param}, compute={self.compute}): with a param dtype of its own, compute "
                "runs under torch.autocast, which offers torch.bfloat16 and torch.float16; leave one of the two out"
            )

    @property
    def autocast(self) -> bool:
        """Whether parameters and maths have different dtypes, so that forward runs under autocast."""
        return self.param is not None and self.compute is not None and self.param != self.compute

    def describe(self, own: torch.dtype) -> str:
        """The five dtypes that parameters of dtype `own` get."""
        param = self.param_dtype(own)
        dtypes = {
            "param": param,
            "compute": self.compute or param,
            "reduce": self.reduce_dtype(param),
            "accumulate": self.accumulate_dtype(param),
            "master": self.master_dtype(param),
        }
        return ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())

    def param_dtype(self, own: torch.dtype) -> torch.dtype:
        """The dtype that a parameter of dtype `own` has once sharded; integer parameters keep theirs."""
        if not own.is_floating_point:
            return own
        return self.param or self.compute or own

    def reduce_dtype(self, param: torch.dtype) -> torch.dtype:
        """The dtype of the full gradients of parameters of dtype `param`."""
        return self.reduce or param

    def accumulate_dtype(self, param: torch.dtype) -> torch.dtype:
        """The dtype of the reduced gradients of parameters of dtype `param`."""
        return self.accumulate or self.reduce_dtype(param)

    def master_dtype(self, param: torch.dtype) -> torch.dtype:
        """The dtype in which parameters of dtype `param` are updated."""
        return self.master or torch.promote_types(param, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Stage 3: which parameters stay whole on every rank between uses; no setting changes a bit of the result.

    Their units are treated as at stage 2: gradients, masters and optimizer state are sharded, parameters are gathered
    once a step instead of at every use.

    Args:
        whole_modules: modules whose parameters stay whole, such as embeddings: classes, or a predicate
            `(name, module) -> bool`. Each becomes a unit of its own.
        whole_bytes: units of at most so many bytes stay whole too.
    """

    whole_modules: UnitChoice = None
    whole_bytes: int = 0

    def __post_init__(self) -> None:
        if (
            not isinstance(self.whole_bytes, int)
            or isinstance(self.whole_bytes, bool)
            or self.whole_bytes < 0
        ):
            raise ZeroConfigError(
                f"Placement(whole_bytes=...): expected a number of bytes >= 0, got {self.whole_bytes!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many bytes may be on their way while compute goes on; no setting changes a bit of the result.

    Args:
        enabled: False waits for every collective where it is launched; the other limits have no meaning then.
        reduce_bytes: full gradients in reduction at once, per rank, and at stages 1 and 2 updated parameters on their
            way to it; at the limit the oldest is waited for. `None`: one largest unit. At stage 3 on the CPU a rank
            waits for no other here, whatever limit or `enabled` say, since others may need its shards.
        prefetch_bytes: stage 3: full parameters gathered ahead of use, per rank. `None`: one largest unit.
        publish_late: stages 1 and 2 (and what stays whole at stage 3): `step` returns while updated parameters are on
            their way to the other ranks; the forward of their unit waits for them, and so does whatever else touches
            a parameter. Worth having on an accelerator and on a network, not between CPU ranks of one machine. What
            took a parameter's memory before the step (`param.data`, `param.detach()`) must not be read after it
            until the next forward is over.
        timeout_s: seconds after which a collective that has not finished is an error (where the back end of
            the process group lets a wait end). Raise it where one rank works alone for longer, as to save a checkpoint.
    """

    enabled: bool = True
    reduce_bytes: int | None = None
    prefetch_bytes: int | None = None
    publish_late: bool = False
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for field in ("reduce_bytes", "prefetch_bytes"):
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ZeroConfigError(f"Overlap({field}=...): expected a number of bytes >= 0, got {value!r}")
        for field in ("enabled", "publish_late"):
            if not isinstance(getattr(self, field), bool):
                raise ZeroConfigError(f"Overlap({field}=...): expected a bool, got {getattr(self, field)!r}")
        limits = [field for field in ("reduce_bytes", "prefetch_bytes") if getattr(self, field) is not None]
        if not self.enabled and (limits or self.publish_late):
            raise ZeroConfigError(
                "Overlap(enabled=False) waits for every collective where it is launched; leave "
                f"{' and '.join(limits + ['publish_late'] * self.publish_late)} out"
            )
        if not (isinstance(self.timeout_s, (int, float)) and 0 < self.timeout_s < math.inf):
            raise ZeroConfigError(f"Overlap(timeout_s=...): expected seconds > 0, got {self.timeout_s!r}")


def refuse_what_has_no_effect(
    stage: int, overlap: Overlap, placement: Placement, *, fills_nothing: bool
) -> None:
    """Raise where `shard` is asked for something that cannot happen at this stage, or with this model.

    Args:
        stage: of the model.
        overlap: what was asked for.
        placement: likewise.
        fills_nothing: `init_module` was given, and nothing of the model is on the meta device.

    Raises:
        ZeroConfigError: names the argument, and says why.
    """
    is_whole = f"at stage {stage} everything stays whole; leave it out, or use stage 3"
    rules = [
        (stage < 3 and placement != Placement(), f"placement: {is_whole}"),
        (stage < 3 and overlap.prefetch_bytes is not None, f"Overlap(prefetch_bytes=...): {is_whole}"),
        (
            overlap.publish_late and stage == 0,
            "Overlap(publish_late=True): at stage 0 every rank updates all parameters itself; leave it out, or use "
            "stage 1 or 2",
        ),
        (
            overlap.publish_late and stage == 3 and placement == Placement(),
            "Overlap(publish_late=True): at stage 3 it is for units that stay whole, and without placement= there are "
            "none; leave it out",
        ),
        (fills_nothing, "init_module: nothing of the model is on the meta device to be filled; leave it out"),
    ]
    for broken, message in rules:
        if broken:
            raise ZeroConfigError(message)
