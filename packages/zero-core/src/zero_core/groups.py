"""Which ranks share the shards of a model, which hold the same ones, and which are all of them.

In: a mesh or a process group. Out: `Groups`. Next: `wires` makes their wires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import ZeroConfigError


@dataclass(frozen=True)
class Groups:
    """The ranks of a model.

    Attributes:
        shard: those that share one set of shards.
        replicate: those that hold the same shard; None where no others do.
    """

    shard: dist.ProcessGroup
    replicate: dist.ProcessGroup | None = None


def resolve_groups(mesh: DeviceMesh | dist.ProcessGroup) -> Groups:
    """What to shard over: a process group; a mesh's only dimension, or its "dp", or its "dp_shard".

    Raises:
        ZeroConfigError: it is neither, or a mesh without such a dimension.
    """
    if isinstance(mesh, dist.ProcessGroup):
        return Groups(mesh)
    if not isinstance(mesh, DeviceMesh):
        raise ZeroConfigError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    if "dp_shard" in names and mesh.ndim > 1:
        replicas = mesh["dp_replicate"].get_group() if "dp_replicate" in names else None
        alone = replicas is None or replicas.size() == 1
        return Groups(mesh["dp_shard"].get_group(), None if alone else replicas)
    if mesh.ndim == 1:
        return Groups(mesh.get_group())
    if "dp" in names:
        return Groups(mesh["dp"].get_group())
    raise ZeroConfigError(
        "mesh: expected one dimension, or one named 'dp', or 'dp_shard' with or without 'dp_replicate', got dimensions "
        f'{names or mesh.ndim}; pass mesh["name"]'
    )


def device_type(mesh: DeviceMesh | dist.ProcessGroup, group: dist.ProcessGroup) -> str:
    """The type of the devices between which `group`, that of a mesh, is meant to send."""
    if isinstance(mesh, DeviceMesh):
        return torch.device(mesh.device_type).type
    return torch.device(dist.distributed_c10d._get_pg_default_device(group)).type


def group_of_all(mesh: DeviceMesh | dist.ProcessGroup, groups: Groups) -> dist.ProcessGroup:
    """All ranks of a model, one set of shards after another; every one of them must call it.

    Raises:
        ZeroConfigError: ranks of the mesh do not ascend in that order.
    """
    if groups.replicate is None:
        return groups.shard
    assert isinstance(mesh, DeviceMesh)
    names = [name for name in mesh.mesh_dim_names or () if name in ("dp_replicate", "dp_shard")]
    ranks = mesh[tuple(names)].mesh.flatten().tolist()
    if names[0] != "dp_replicate" or ranks != sorted(ranks):
        raise ZeroConfigError(
            f"mesh: expected 'dp_replicate' before 'dp_shard' and ascending ranks, got {names} with ranks {ranks}"
        )
    return cast(dist.ProcessGroup, dist.new_group(ranks, use_local_synchronization=True))


def sharding_group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that share one set of shards when a model is sharded over `mesh`.

    Args:
        mesh: as for `zero_core.shard`.

    Raises:
        ZeroConfigError: there is nothing in the mesh to shard over.
    """
    return resolve_groups(mesh).shard


def data_parallel_group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks that train one model when it is sharded over `mesh`: those that share its shards, and replicas.

    Args:
        mesh: as for `zero_core.shard`.

    Raises:
        ZeroConfigError: there is nothing in the mesh to shard over.

    Every rank of the mesh must call it: with replicas it makes a group.
    """
    return group_of_all(mesh, resolve_groups(mesh))


def sibling_group(group: dist.ProcessGroup, backend: str | None = None) -> dist.ProcessGroup:
    """A second group of the same ranks, so that what travels in the two needs no common order.

    Every rank of `group` must call it; ranks outside need not.
    """
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    return cast(dist.ProcessGroup, made)
