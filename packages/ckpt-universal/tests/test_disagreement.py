"""Ranks that say different things: every one of them hears of it at once, and nothing is committed."""

from __future__ import annotations

import time

import ckpt_universal as ckpt
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

run_ranks = pytest.importorskip("zero_core.testing").run_ranks  # spawns processes


def refuse(call, match, error=ckpt.CheckpointError):
    begun = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    assert time.monotonic() - begun < 20


def disagree_rank(rank, root):
    state = {f"w{each}": torch.ones(10) for each in range(4)}
    for step in (1, 2):
        ckpt.save(root, state, step=step)
    refuse(lambda: ckpt.save(root, state, step=2 - rank), "rank 0 saves step 2 .* and rank 1 step 1")
    refuse(lambda: ckpt.save(root, state, step=-rank), "expected a number >= 0|rank 1: ConfigError")
    refuse(
        lambda: ckpt.save(root, {"hist": [1] * (rank + 1)}, step=3), "lists of different lengths, 1 on rank 0"
    )
    apart = {"x": ckpt.PerRank(5) if rank else 7}
    refuse(lambda: ckpt.save(root, apart, step=3), "7 on rank 0, and ckpt_universal.PerRank on another")
    saver = ckpt.AsyncSaver(root)
    refuse(lambda: saver.save(state, step=2 - rank), "rank 0 saves step 2 .* and rank 1 step 1")
    refuse(lambda: saver.save(state, step=-rank), "expected a number >= 0|rank 1: ConfigError")
    saver.save(state, step=4)
    saver.close()
    refuse(lambda: saver.save(state, step=5), "the saver is closed")

    def rename(name):
        if rank:
            raise KeyError(name)
        return name

    into = {f"w{each}": torch.zeros(10) for each in range(4)}
    refuse(
        lambda: ckpt.load(root, into=into, rename=rename),
        "w0|rank 1: KeyError",
        (KeyError, ckpt.CheckpointError),
    )
    refuse(lambda: ckpt.load(root, into=into, only="v*"), "on any rank")
    stage = {"w0": into["w0"]} if rank else into
    ckpt.load(root, into=stage, only="w3")  # which one stage alone has
    assert bool(into["w3"].any()) == (rank == 0)
    assert sorted(each.name for each in root.glob("step-*")) == [f"step-{step:09d}" for step in (1, 2, 4)]


def test_disagreement(tmp_path):
    run_ranks(disagree_rank, 2, tmp_path)


def apart_rank(rank, root):
    mesh = init_device_mesh("cpu", (4,))
    whole = distribute_tensor(torch.arange(48.0).view(6, 8), mesh, [Shard(1)])
    ckpt.save(root, {"v": torch.arange(48.0)}, step=1)
    apart = whole.reshape(-1)
    refuse(lambda: ckpt.load(root, into={"v": apart}), "lies apart")
    refuse(lambda: ckpt.save(root, {"v": apart}, step=2), "lies apart")


def test_what_lies_apart_in_a_tensor_is_refused(tmp_path):
    run_ranks(apart_rank, 4, tmp_path)


def strided_rank(rank, root):
    """FSDP2 over tensor parallelism: one strided placement, whose parts are in one piece."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for rows in (8, 5, 7, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, rows, bias=False))
        expected = model[0].weight.detach().clone()
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        ckpt.save(root / str(rows), {"m": model}, step=1)
        assert torch.equal(ckpt.read_tree(root / str(rows))["m"]["0.weight"], expected)
        torch.nn.init.zeros_(model[0].weight)
        ckpt.load(root / str(rows), into={"m": model})
        assert torch.equal(model[0].weight.full_tensor(), expected)


def test_strided_shards_in_one_piece_are_stored(tmp_path):
    run_ranks(strided_rank, 4, tmp_path)
