"""Find or make the process group, the device and the mesh that a training process works on.

In: the environment variables of a launcher (see `launchers`), or nothing (then a group of one rank). Out: the mesh to
shard over.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .errors import ConfigError
from .launchers import torchrun_variables


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Make the default process group unless there is one; the arguments are DeepSpeed's.

    Args:
        dist_backend: Back end of torch.distributed; None chooses gloo, with nccl for CUDA tensors.
        auto_mpi_discovery: Where torchrun's variables are missing, take those of Open MPI, MPICH or Slurm, and set
            torchrun's. On one machine ranks meet at 127.0.0.1; on several, MASTER_ADDR must say where.
        distributed_port: Port of the rendezvous where MASTER_PORT does not say.
        verbose: No effect: nothing is said.
        timeout: Deadline of the group's own collectives; None leaves it to torch. See `initialize(timeout_s=)` for
            those of training.
        init_method: URL of the rendezvous; None means the launcher's environment variables.
        dist_init_required: False: there must be a group already.
        config: No effect: nothing in a configuration is about the group.
        rank: This process among all, with `init_method`.
        world_size: Number of processes, with `init_method`.

    Raises:
        ConfigError: If there is none and `dist_init_required` is False; or if there are several processes, and one
            cannot know which it is or where they meet.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise ConfigError("dist_init_required is False, and torch.distributed is not initialised")
    if init_method is None:
        os.environ.update(torchrun_variables(os.environ, distributed_port, others=auto_mpi_discovery))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = dist_backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if init_method is not None:
        dist.init_process_group(
            backend, init_method=init_method, timeout=timeout, rank=rank, world_size=world_size
        )
        return
    if "RANK" not in os.environ:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=alone, rank=0, world_size=1)
        return
    dist.init_process_group(backend, timeout=timeout)


def data_parallel_mesh(given: DeviceMesh | None) -> DeviceMesh:
    """The mesh to shard over, as zero-core understands meshes: the given one, or all ranks.

    Raises:
        ZeroConfigError: If nothing in the given mesh is to be sharded over.
    """
    if given is not None:
        return given
    kind = "cuda" if torch.cuda.is_available() and "nccl" in str(dist.get_backend_config()) else "cpu"
    return init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp",))


def with_replicas(mesh: DeviceMesh, shard_size: int, *, given: bool) -> DeviceMesh:
    """Shards within `shard_size` ranks of `mesh`, replicas across; `shard_size` below 1 leaves the mesh as it is.

    Args:
        mesh: All ranks.
        shard_size: Ranks that share one set of shards; it divides all.
        given: The mesh is the caller's, who has said there what is sharded.

    Raises:
        ConfigError: If the caller gave a mesh.
    """
    if shard_size < 1:
        return mesh
    if given:
        raise ConfigError(
            "zero_optimization.mics_shard_size: initialize(mesh_device=...) decides; give that mesh dimensions "
            "'dp_replicate' and 'dp_shard', or leave one of the two out"
        )
    shape = (mesh.size() // shard_size, shard_size)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
