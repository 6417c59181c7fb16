"""Which ranks of a group share a node.

In: a process group, and how it is cut into nodes (a number, or a mesh of nodes x ranks). Out: a `Topology`: the pure
`Grid`, and the process groups within a node and across. Nothing is looked up in the environment: what a node is, the
caller says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import CompressConfigError


def group_or_default(group: dist.ProcessGroup | None, who: str) -> dist.ProcessGroup:
    """What was given, or the default process group.

    Raises:
        CompressConfigError: none was given, and torch.distributed is not initialised.
    """
    if group is not None:
        return group
    if not dist.is_initialized():
        raise CompressConfigError(
            f"{who}: expected group=, or torch.distributed initialised: call torch.distributed.init_process_group first"
        )
    return dist.distributed_c10d._get_default_group()


@dataclass(frozen=True)
class Grid:
    """PURE: ranks of a group, cut into nodes of neighbours: rank = node * node_size + place.

    Raises:
        CompressConfigError: the node size does not divide the number of ranks.
    """

    num_ranks: int
    node_size: int

    def __post_init__(self) -> None:
        size = self.node_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or self.num_ranks % size:
            divisors = [d for d in range(1, self.num_ranks + 1) if self.num_ranks % d == 0]
            raise CompressConfigError(
                f"node_size: expected a divisor of the group's {self.num_ranks} ranks "
                f"({', '.join(map(str, divisors))}), got {size!r}"
            )

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return self.num_ranks // self.node_size

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.node_size

    def place_of(self, rank: int) -> int:
        """A rank's number within its node."""
        return rank % self.node_size

    def inside(self, rank: int) -> list[int]:
        """The ranks of a rank's node, by place."""
        first = self.node_of(rank) * self.node_size
        return list(range(first, first + self.node_size))

    def across(self, rank: int) -> list[int]:
        """The ranks with a rank's place, by node."""
        return list(range(self.place_of(rank), self.num_ranks, self.node_size))


@dataclass(frozen=True)
class Topology:
    """A group and its nodes.

    Attributes:
        group: all ranks.
        grid: how they are cut into nodes.
        inside: the ranks of this rank's node; None where it is the only one.
        across: those with this rank's place in other nodes, and itself; None where there is one node.
    """

    group: dist.ProcessGroup
    grid: Grid
    inside: dist.ProcessGroup | None
    across: dist.ProcessGroup | None


def grid_of(group: dist.ProcessGroup, node_size: int | None, mesh: DeviceMesh | None) -> Grid:
    """How a group is cut; no communication.

    Args:
        group: the ranks.
        node_size: neighbours that share a node; None: every rank is a node of its own.
        mesh: nodes x ranks of a node, of just these ranks in just this order; instead of `node_size`.

    Raises:
        CompressConfigError: both are given, the size does not divide, or the mesh is of other ranks.
    """
    if mesh is None:
        return Grid(group.size(), 1 if node_size is None else node_size)
    if node_size is not None:
        raise CompressConfigError(
            "node_size and mesh both say what a node is; leave one out (the mesh's last dimension is the node's)"
        )
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != ranks:
        raise CompressConfigError(
            f"mesh: expected two dimensions (nodes, ranks of a node) over the ranks {ranks} of the group, got shape "
            f"{tuple(mesh.mesh.shape)} over {mesh.mesh.flatten().tolist()}; pass mesh['node', 'local'] or the like"
        )
    return Grid(group.size(), mesh.mesh.shape[1])


def resolve(
    group: dist.ProcessGroup, *, node_size: int | None = None, mesh: DeviceMesh | None = None
) -> Topology:
    """Make the groups within a node and across; every rank of `group` must call it.

    A mesh has such groups, which others use, too: on an accelerator a group's collectives have one order, and that of
    gathers and that of reductions among each other is nobody's.

    Args:
        group: as for `grid_of`.
        node_size: as there.
        mesh: as there.

    Raises:
        CompressConfigError: as `grid_of`, before any group is made.
    """
    grid = grid_of(group, node_size, mesh)
    rank = group.rank()
    return Topology(group, grid, _part(group, grid.inside(rank)), _part(group, grid.across(rank)))


def _part(group: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup | None:
    """A group of some ranks of `group`, which are among them."""
    if len(ranks) == 1:
        return None
    if len(ranks) == group.size():
        return group
    of_world = [dist.get_global_rank(group, rank) for rank in ranks]
    made: dist.ProcessGroup = dist.new_group(of_world, use_local_synchronization=True)
    return made
