"""PURE: what the optimizers keep, in bytes a parameter; the tables of their docstrings as arithmetic.

In: which optimizer, how many ranks, whether parameters are fp32. Out: bytes, phase by phase. Tests count live tensors
against it; planners add it up before anything is allocated.
"""

from __future__ import annotations

from typing import Literal

from ..errors import CompressConfigError

Kind = Literal["OneBitAdam", "OneBitLamb", "ZeroOneAdam"]


def state_bytes(
    kind: str, world: int, *, low: bool = False, shard: bool = False, steps_alone: bool = True
) -> tuple[float, float]:
    """Bytes a parameter and rank before the variance is frozen, and after.

    Args:
        kind: "OneBitAdam", "OneBitLamb" or "ZeroOneAdam".
        world: ranks.
        low: parameters are not fp32, so there are masters.
        shard: state of warm-up is sharded.
        steps_alone: `ZeroOneAdam`: local_step_clipper > 1.

    Raises:
        CompressConfigError: another kind.
    """
    master, residuals = (4 if low else 0), 4 + 4 / world
    if kind == "ZeroOneAdam":
        frozen = (
            8 + 4 + 4 if steps_alone else 8 + master
        )  # momentum, divisor; drift, what ranks have in common
        return 12 + master + residuals, frozen + residuals
    if kind not in ("OneBitAdam", "OneBitLamb"):
        raise CompressConfigError(f"kind: expected OneBitAdam, OneBitLamb or ZeroOneAdam, got {kind!r}")
    warm = 12 / world if shard else 8 + master
    going_on = 4 if kind == "OneBitLamb" else 0  # the variance beside its frozen divisor
    return warm, 8 + going_on + master + residuals
