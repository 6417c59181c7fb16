"""PURE: what cores there are -> which of them each rank gets.

In: NUMA nodes with their cores, each a tuple of the CPUs (hardware threads) that share it. Out: one `CoreSet` a rank.
A rank stays within one node where there are ranks enough for that, since memory of another node is slower; and a core
is not shared where there are cores enough. Next: `binding`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .errors import OffloadConfigError


@dataclass(frozen=True)
class Node:
    """One NUMA node: its number, and its cores as tuples of CPU numbers."""

    number: int
    cores: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CoreSet:
    """What one rank runs on.

    Attributes:
        cpus: CPU numbers, ascending.
        nodes: the NUMA nodes that they belong to, ascending.
        num_cores: physical cores among them: as many threads as memory-bound work can use.
    """

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]
    num_cores: int


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPU numbers of a list as Linux writes it: `0-3,8,10-11`."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def make_nodes(
    cpus_of_node: Mapping[int, Collection[int]],
    siblings: Mapping[int, Sequence[int]],
    allowed: Collection[int],
) -> tuple[Node, ...]:
    """Nodes and cores, of the allowed CPUs alone.

    Args:
        cpus_of_node: node -> its CPUs.
        siblings: CPU -> all CPUs of its core, itself among them; a CPU that is not there has a core of its own.
        allowed: CPUs that this process may use; those of no node come as a node -1.
    """
    known = {cpu for cpus in cpus_of_node.values() for cpu in cpus}
    everything = {**cpus_of_node, -1: set(allowed) - known}
    nodes = []
    for number in sorted(everything):
        mine = sorted(set(everything[number]) & set(allowed))
        cores = {tuple(sorted({cpu, *siblings.get(cpu, ())} & set(mine))) for cpu in mine}
        if cores:
            nodes.append(Node(number, tuple(sorted(cores))))
    return tuple(nodes)


def assign(nodes: Sequence[Node], num_ranks: int) -> tuple[CoreSet, ...]:
    """Share cores out among ranks.

    With at least as many ranks as nodes each rank has cores of one node, and ranks go to nodes in proportion to their
    cores; with fewer, each has whole nodes. Where a node has more ranks than cores, they share out its CPUs, and where
    it has more ranks than those, ranks share CPUs.

    Args:
        nodes: as `make_nodes` gives.
        num_ranks: ranks on this machine, at least 1.

    Returns:
        One set a rank; neighbours in rank are neighbours on the machine.

    Raises:
        OffloadConfigError: no cores, or no ranks.
    """
    if num_ranks < 1 or not nodes:
        raise OffloadConfigError(
            f"assign: expected ranks and cores, got {num_ranks} ranks and {len(nodes)} nodes"
        )
    if num_ranks < len(nodes):
        return tuple(
            _core_set([(node.number, core) for node in nodes[start:stop] for core in node.cores])
            for start, stop in _cuts(len(nodes), num_ranks)
        )
    sets: list[CoreSet] = []
    for node, ranks in zip(nodes, _ranks_of(nodes, num_ranks), strict=True):
        sets += _within(node, ranks)
    return tuple(sets)


def _ranks_of(nodes: Sequence[Node], num_ranks: int) -> list[int]:
    """How many ranks each node gets: one, and each further where a rank then has most cores."""
    ranks = [1] * len(nodes)
    for _ in range(num_ranks - len(nodes)):
        best = max(range(len(nodes)), key=lambda k: (len(nodes[k].cores) / (ranks[k] + 1), -k))
        ranks[best] += 1
    return ranks


def _within(node: Node, ranks: int) -> list[CoreSet]:
    units = list(node.cores)
    if ranks > len(units):
        # First thread of every core, then the second ones: two ranks meet on a core as late as can be.
        units = sorted(
            ((cpu,) for core in units for cpu in core), key=lambda unit: (_turn(node, unit[0]), unit)
        )
    if ranks > len(units):
        return [_core_set([(node.number, units[rank % len(units)])]) for rank in range(ranks)]
    return [_core_set([(node.number, unit) for unit in units[a:b]]) for a, b in _cuts(len(units), ranks)]


def _turn(node: Node, cpu: int) -> int:
    return next(core.index(cpu) for core in node.cores if cpu in core)


def _core_set(units: Sequence[tuple[int, tuple[int, ...]]]) -> CoreSet:
    cpus = sorted(cpu for _, unit in units for cpu in unit)
    return CoreSet(tuple(cpus), tuple(sorted({number for number, _ in units})), len(units))


def _cuts(total: int, parts: int) -> list[tuple[int, int]]:
    """`parts` runs of `total` things, as even as can be."""
    return [(total * k // parts, total * (k + 1) // parts) for k in range(parts)]
