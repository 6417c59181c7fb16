"""Bind this process to its rank's cores, and undo it.

In: which rank of how many on this machine. Out: every thread of the process on the rank's cores, and as many torch
threads as it has physical cores; memory that is touched first from now on lies on their node.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from .errors import BindingError, OffloadConfigError
from .topology import CoreSet, Node, assign, make_nodes, parse_cpus

SYSTEM = Path("/sys/devices/system")


@dataclass(frozen=True)
class BoundCores(CoreSet):
    """The cores that this process is bound to, until `close()` or the end of a `with` block."""

    _before: dict[int, set[int]] = field(repr=False, compare=False)
    _num_threads: int = field(repr=False, compare=False)

    def close(self) -> None:
        """Give every thread back what it had; those that came since get what this one had. May be called again."""
        if self._before:
            mine = self._before.get(threading.get_native_id()) or set().union(*self._before.values())
            _bind_threads(lambda thread: self._before.get(thread, mine))
            torch.set_num_threads(self._num_threads)
            self._before.clear()

    def __enter__(self) -> BoundCores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bind_rank(local_rank: int, num_local_ranks: int, *, system: Path = SYSTEM) -> BoundCores:
    """Bind this process, all its threads, to the cores of one of the ranks on this machine.

    The cores that this process may use now (its affinity, and so its cgroup's cpuset) are shared out by
    `topology.assign`: every rank has to be allowed the same ones. Under a launcher that has bound each rank to cores
    of its own already, call `bind_rank(0, 1)` for the number of threads, or leave it out.

    Args:
        local_rank: this rank among those of this machine.
        num_local_ranks: how many there are.
        system: where Linux describes the machine.

    Returns:
        The cores. `close()`, or leaving a `with` block, restores affinities and the number of torch threads.

    Raises:
        OffloadConfigError: `local_rank` is not one of the ranks.
        BindingError: the system binds no threads (macOS, Windows), or refuses to.
    """
    if not 0 <= local_rank < num_local_ranks:
        raise OffloadConfigError(
            f"bind_rank: expected 0 <= local_rank < num_local_ranks, got {local_rank} of {num_local_ranks}"
        )
    if not hasattr(os, "sched_setaffinity"):
        raise BindingError("bind_rank: this system binds no threads to cores; leave it out here")
    cores = assign(read_nodes(os.sched_getaffinity(0), system), num_local_ranks)[local_rank]
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    bound = BoundCores(cores.cpus, cores.nodes, cores.num_cores, before, torch.get_num_threads())
    try:
        # Threads of a pool that is already there keep their affinity unless each is told.
        _bind_threads(lambda thread: set(cores.cpus))
        torch.set_num_threads(cores.num_cores)
    except OSError as error:
        bound.close()
        raise BindingError(f"bind_rank: CPUs {cores.cpus}: {error}") from error
    return bound


def read_nodes(allowed: Collection[int], system: Path = SYSTEM) -> tuple[Node, ...]:
    """The NUMA nodes and cores of this machine, of the allowed CPUs alone; what is not described is taken as plain.

    Args:
        allowed: CPU numbers.
        system: where Linux describes the machine.
    """
    cpus_of_node = {
        int(folder.name[4:]): parse_cpus((folder / "cpulist").read_text())
        for folder in (system / "node").glob("node[0-9]*")
    }
    siblings = {}
    for cpu in allowed:
        listing = system / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        if listing.exists():
            siblings[cpu] = parse_cpus(listing.read_text())
    return make_nodes(cpus_of_node, siblings, allowed)


def _threads() -> list[int]:
    """Every thread of this process."""
    return [int(folder.name) for folder in Path("/proc/self/task").iterdir()]


def _bind_threads(cpus_of: Callable[[int], set[int]]) -> None:
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(thread, cpus_of(thread))
