"""One model's tensors in every layout: a function each, from whole tensors to the state of one rank."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from ckpt_universal import Shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split

SHAPES = {
    "embed.weight": (37, 12),
    "blocks.0.qkv": (12, 36),
    "blocks.0.bias": (36,),
    "blocks.1.qkv": (12, 36),
    "experts": (4, 6, 10),
    "scale": (),
    "nothing": (0, 5),
}


def whole(seed=0, dtype=torch.float32):
    """The tensors, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def replicated(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def flat_shards(tensors):
    """As ZeRO: all tensors in one flat buffer, cut into equal parts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = sum(t.numel() for t in tensors.values())
    low, high = total * rank // world, total * (rank + 1) // world
    state, at = {}, 0
    for name, tensor in tensors.items():
        start, stop = max(low - at, 0), min(high - at, tensor.numel())
        if start < stop or (tensor.numel() == 0 and rank == 0):
            local = tensor.reshape(-1)[start:stop].clone()
            state[name] = Shard(tuple(tensor.shape), tensor.dtype, (start,), local)
        at += tensor.numel()
    return state


def rows(tensors):
    """DTensors, split by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(tensor.clone(), mesh, [Split(0) if tensor.dim() else Replicate()])
        for name, tensor in tensors.items()
    }


def columns(tensors):
    """DTensors, split by columns where there are any, as tensor parallelism does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        name: distribute_tensor(tensor.clone(), mesh, [Split(1) if tensor.dim() > 1 else Replicate()])
        for name, tensor in tensors.items()
    }


def rows_and_columns(tensors):
    """FSDP times tensor parallelism, on an even number of ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    return {
        name: distribute_tensor(
            tensor.clone(), mesh, [Split(0), Split(1)] if tensor.dim() > 1 else [Replicate(), Replicate()]
        )
        for name, tensor in tensors.items()
    }


def stages(tensors):
    """A pipeline: each rank has some of the tensors, whole."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return {name: tensor.clone() for at, (name, tensor) in enumerate(tensors.items()) if at % world == rank}


def expert_boxes(tensors):
    """Expert parallelism: each rank has some experts; the rest is replicated."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state = replicated(tensors)
    experts = tensors["experts"]
    low, high = (experts.shape[0] * r // world for r in (rank, rank + 1))
    state["experts"] = Shard(tuple(experts.shape), experts.dtype, (low, 0, 0), experts[low:high].clone())
    return state


LAYOUTS = {
    f.__name__: f for f in (replicated, flat_shards, rows, columns, rows_and_columns, stages, expert_boxes)
}


def local_values(leaf):
    """This rank's values."""
    if isinstance(leaf, Shard):
        return leaf.local
    return leaf.to_local() if hasattr(leaf, "to_local") else leaf


def bytes_held(state):
    """Bytes of this rank's part of a state."""
    return sum(math.prod(local_values(v).shape) * local_values(v).element_size() for v in state.values())
