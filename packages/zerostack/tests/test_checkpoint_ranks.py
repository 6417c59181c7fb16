"""Saved by some ranks, read by others; a rank that fails stops all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from zero_core.testing import run_ranks
from zerostack.checkpoint import Range, open_checkpoint, save
from zerostack.errors import CheckpointError

SIZES = {"big": (11, 5), "odd": (7,), "one": (), "none": (0,)}


@dataclass
class Part:
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    local: torch.Tensor


def value(name):
    shape = SIZES[name]
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def parts(rank, world):
    """Even slices; ranks may hold nothing of a small tensor; "shared" is whole everywhere."""
    held = {}
    for name, shape in SIZES.items():
        flat = value(name).reshape(-1)
        step = -(-flat.numel() // world)
        start = min(rank * step, flat.numel())
        local = flat[start : start + step]
        if local.numel() or not flat.numel():
            held[name] = Part(shape, flat.dtype, (start,), local)
    held["shared"] = Part((6,), torch.float32, (0,), torch.arange(6.0))
    return held


def save_rank(rank, root):
    group = dist.group.WORLD
    own = {"rng": torch.full((3,), rank, dtype=torch.uint8)}
    values = {"writer": rank}
    save(root, "t", parts(rank, group.size()), values, group=group, per_rank=own, piece_bytes=16)


def load_rank(rank, root):
    group = dist.group.WORLD
    reader = open_checkpoint(root, None, group)
    wanted = {name: Range.of(part) for name, part in parts(rank, group.size()).items()}
    found = reader.read(wanted)
    for name, part in parts(rank, group.size()).items():
        assert torch.equal(found[name], part.local), name
    return reader.index.values, {name: tensor.tolist() for name, tensor in reader.own().items()}


@pytest.mark.parametrize(("writers", "readers"), [(2, 1), (1, 3), (3, 2), (2, 2)])
def test_any_number_of_ranks_reads_it(tmp_path, writers, readers):
    run_ranks(save_rank, writers, tmp_path)
    found = run_ranks(load_rank, readers, tmp_path)
    for rank, (values, own) in enumerate(found):
        assert values == {"writer": 0}
        assert own == ({"rng": [rank] * 3} if writers == readers else {})


def fail_rank(rank, root):
    """Rank 1's disk is full; then it finds a damaged file; then it gives another tag."""
    group = dist.group.WORLD
    save_rank(rank, root)
    fsync = os.fsync
    if rank == 1:

        def full(handle):
            raise OSError(28, "No space left on device")

        os.fsync = full
    with pytest.raises(OSError if rank == 1 else CheckpointError, match="No space left"):
        save(root, "u", parts(rank, 2), {}, group=group)
    os.fsync = fsync
    dist.barrier()
    if rank == 0:
        file = root / "t" / "rank-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    dist.barrier()
    reader = open_checkpoint(root, "t", group)
    with pytest.raises(CheckpointError, match="is damaged"):  # it is rank 1's own, and nobody goes on
        reader.own()
    return sorted(p.name for p in root.iterdir())


def test_one_failing_rank_stops_all_and_nothing_is_left(tmp_path):
    assert run_ranks(fail_rank, 2, tmp_path) == [["latest", "t"]] * 2
