"""What to say when a collective has failed: which unit, which rank, and what every other rank was doing.

In: the failed collective's name and the back end's error. Out: a `CollectiveError`. Every rank that fails leaves its
last collective in the store through which the ranks once met; who has left nothing is dead or still computing.
"""

from __future__ import annotations

import json
import time

import torch.distributed as dist

from .errors import CollectiveError

PATIENCE_S = 5.0
"""How long a rank that failed waits for the word of the others."""


def diagnose(group: dist.ProcessGroup, what: str, timeout_s: float, error: Exception) -> CollectiveError:
    """Compose the error for this rank's failed collective `what`."""
    rank, size = group.rank(), group.size()
    others = _positions(group, what, patience_s=min(PATIENCE_S, timeout_s))
    lines = [
        f"rank {r} was at {others[r]}"
        if r in others
        else f"rank {r} gives no sign: it died, or has not come this far"
        for r in range(size)
        if r != rank
    ]
    return CollectiveError(
        f"rank {rank} of {size}: {what} cannot finish ({str(error).strip().splitlines()[0]}); {'; '.join(lines)}. "
        "All ranks must use the same units in the same passes, and the last pass before a step is under no_sync on all "
        "of them or on none; end the job, look at the first rank that failed, and "
        f"resume from a checkpoint. Where a rank works alone for longer than {timeout_s:g} s, raise Overlap(timeout_s=)"
    )


def _positions(group: dist.ProcessGroup, position: str, patience_s: float) -> dict[int, str]:
    """What each rank of the group that fails within `patience_s` says it was doing."""
    found: dict[int, str] = {}
    try:
        store = dist.distributed_c10d._get_default_store()
        key = "zero_core/failure"
        ranks = dist.get_process_group_ranks(group)
        store.set(f"{key}/{ranks[group.rank()]}", json.dumps(position))
        deadline = time.monotonic() + patience_s
        while len(found) < group.size() - 1 and time.monotonic() < deadline:
            for rank in set(range(group.size())) - {group.rank()} - set(found):
                if store.check([f"{key}/{ranks[rank]}"]):
                    found[rank] = json.loads(store.get(f"{key}/{ranks[rank]}"))
            time.sleep(0.05)
    except (RuntimeError, ValueError):  # the store lives on a rank that is gone, or there is no default group
        pass
    return found
