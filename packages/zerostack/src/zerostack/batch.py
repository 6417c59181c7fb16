"""The batch equation: train_batch_size = micro batch x accumulation steps x ranks. Pure.

In: what the configuration gives of the three numbers, and the number of data-parallel ranks. Out: all three,
and where each came from.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The three numbers, which satisfy the equation.

    Attributes:
        train: Samples in one optimizer step, over all ranks.
        micro: Samples in one forward and backward on one rank.
        accumulation: Micro-batches in one optimizer step on one rank.
        sources: How each derived number was found, by its key.
    """

    train: int
    micro: int
    accumulation: int
    sources: dict[str, str]


def solve(train: int | None, micro: int | None, accumulation: int | None, world: int) -> Batch:
    """Fill in what is missing and check what is given.

    Args:
        train: `train_batch_size`, if given.
        micro: `train_micro_batch_size_per_gpu`, if given.
        accumulation: `gradient_accumulation_steps`, if given; 1 when neither it nor both others are.
        world: Number of data-parallel ranks.

    Raises:
        ConfigError: If too little is given, or the numbers do not satisfy the equation.
    """
    sources: dict[str, str] = {}
    if train is None and micro is None:
        raise ConfigError(
            f"give {TRAIN} or {MICRO}: neither is there, and {TRAIN} = {MICRO} x {ACCUMULATION} x ranks"
        )
    if accumulation is None and (train is None or micro is None):
        accumulation, sources[ACCUMULATION] = 1, "default"
    if train is None and micro is not None and accumulation is not None:
        train = micro * accumulation * world
        sources[TRAIN] = f"derived: {MICRO} {micro} x {ACCUMULATION} {accumulation} x ranks {world}"
    elif micro is None and train is not None and accumulation is not None:
        micro = train // (accumulation * world)
        sources[MICRO] = f"derived: {TRAIN} {train} / ({ACCUMULATION} {accumulation} x ranks {world})"
    elif accumulation is None and train is not None and micro is not None:
        accumulation = train // (micro * world)
        sources[ACCUMULATION] = f"derived: {TRAIN} {train} / ({MICRO} {micro} x ranks {world})"
    assert train is not None
    assert micro is not None
    assert accumulation is not None
    if train != micro * accumulation * world or train == 0:
        raise ConfigError(_mismatch(train, micro, accumulation, world, sources))
    return Batch(train=train, micro=micro, accumulation=accumulation, sources=sources)


def _mismatch(train: int, micro: int, accumulation: int, world: int, sources: dict[str, str]) -> str:
    if MICRO in sources:
        known = f"{ACCUMULATION} {accumulation} x ranks {world} = {accumulation * world}"
    elif ACCUMULATION in sources:
        known = f"{MICRO} {micro} x ranks {world} = {micro * world}"
    else:
        product = micro * accumulation * world
        return (
            f"{TRAIN} {train} != {MICRO} {micro} x {ACCUMULATION} {accumulation} x ranks {world} "
            f"= {product}; "
            "change one of them, or leave one out and it is derived"
        )
    return f"{TRAIN} {train} is not a multiple of {known}"
