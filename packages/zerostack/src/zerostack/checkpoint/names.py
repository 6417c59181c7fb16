"""What tensors are called in a checkpoint: `model.<parameter or buffer>` and `optimizer.<parameter>.<key>`. Pure.

In: names, or what goes by them. Out: others. `master`, among the keys, is the copy of a parameter that is stepped.
Next: `contents`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import zero_core as zero

MODEL, OPTIMIZER = "model.", "optimizer."
_MASTER = ".master"


def of_optimizer(state: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    """State that goes by `<parameter>.<key>`, by the names that it has in a checkpoint."""
    return {OPTIMIZER + name: shard for name, shard in state.items()}


def under(prefix: str, described: Mapping[str, zero.Shard]) -> dict[str, zero.Shard]:
    """What has names that begin so, without it."""
    return {name.removeprefix(prefix): s for name, s in described.items() if name.startswith(prefix)}


def is_master(name: str) -> bool:
    """Whether a tensor is a parameter's master."""
    return name.startswith(OPTIMIZER) and name.endswith(_MASTER)


def is_state(name: str) -> bool:
    """Whether a tensor is what an optimizer keeps of a parameter beside its values."""
    return name.startswith(OPTIMIZER) and not name.endswith(_MASTER)


def parameter_of(name: str) -> str:
    """The parameter whose state or master has this name; without `MODEL`."""
    return name.removeprefix(OPTIMIZER).rpartition(".")[0]


def some(names: Sequence[str], most: int = 5) -> str:
    """A few of many names, for a message."""
    if not names:
        return "nothing"
    return ", ".join(repr(name.removeprefix(MODEL)) for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
