"""PURE: chunks and bytes of the 1-bit all-reduce, and of a whole run of the optimizers built on it.

In: numbers of elements, ranks and steps. Out: ranges and exact byte counts, as they are seen in tests at the process
group. Next: `allreduce_1bit` sends what is counted here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from accel_kernels import sign_bytes

from .errors import CompressConfigError


def chunk_ranges(numel: int, world: int) -> list[tuple[int, int]]:
    """Who serves what: `numel` elements in `world` runs `[start, stop)`, in rank order, of sizes that differ by one.

    Nothing is padded: a chunk may have any size, 0 too.

    Raises:
        CompressConfigError: fewer than no elements, or fewer than one rank.
    """
    if numel < 0 or world < 1:
        raise CompressConfigError(
            f"chunk_ranges: expected numel >= 0 and world >= 1, got {numel} and {world}"
        )
    size, longer = divmod(numel, world)
    edges = [rank * size + min(rank, longer) for rank in range(world + 1)]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class SentBytes:
    """What one rank hands to the process group in one all-reduce, in bytes.

    Attributes:
        scatter: of the first phase, in which every rank gets its chunk of all.
        gather: of the second, in which every rank gets all chunks.
    """

    scatter: int
    gather: int

    @property
    def total(self) -> int:
        """Both phases."""
        return self.scatter + self.gather


def sent_1bit(numel: int, world: int, rank: int) -> SentBytes:
    """One `allreduce_1bit`: a bit an element each way, and a scale of 4 bytes a chunk."""
    chunks = [sign_bytes(stop - start) for start, stop in chunk_ranges(numel, world)]
    return SentBytes(scatter=sum(chunks) - chunks[rank], gather=(world - 1) * chunks[rank])


def sent_exact(numel: int, world: int, itemsize: int) -> SentBytes:
    """One uncompressed mean over ranks: a reduce-scatter and an all-gather of equal parts, the last one padded."""
    part = -(-numel // world) * itemsize
    return SentBytes(scatter=(world - 1) * part, gather=(world - 1) * part)


@dataclass(frozen=True, kw_only=True)
class RunVolume:
    """What one rank sends in a run of many steps.

    Attributes:
        sent_bytes: by the compressed optimizer.
        exact_bytes: by data parallelism that reduces every gradient as it is.
        rounds: steps in which something of the size of the model travelled.
    """

    sent_bytes: int
    exact_bytes: int
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times less is sent."""
        return self.exact_bytes / self.sent_bytes if self.sent_bytes else float("inf")


def run_volume(
    buckets: Iterable[int],
    world: int,
    itemsize: int,
    *,
    num_steps: int,
    exact_steps: Iterable[int],
    sync_steps: Iterable[int],
    rank: int = 0,
) -> RunVolume:
    """Count a run.

    Args:
        buckets: elements of each bucket.
        world: ranks.
        itemsize: bytes of an element of a gradient on the wire.
        num_steps: of the run.
        exact_steps: those that reduce gradients as they are.
        sync_steps: those that send signs.
        rank: whose bytes.
    """
    sizes = list(buckets)
    exact = sum(sent_exact(size, world, itemsize).total for size in sizes)
    signs = sum(sent_1bit(size, world, rank).total for size in sizes)
    num_exact, num_syncs = len(set(exact_steps)), len(set(sync_steps))
    return RunVolume(
        sent_bytes=num_exact * exact + num_syncs * signs,
        exact_bytes=num_steps * exact,
        rounds=num_exact + num_syncs,
    )
