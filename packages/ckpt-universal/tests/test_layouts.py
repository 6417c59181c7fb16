"""Saved in one layout, on some ranks; loaded in any other, on others: every value, and few bytes more than those."""

from __future__ import annotations

import itertools
import os

import ckpt_universal as ckpt
import pytest
import torch
from ckpt_layouts import LAYOUTS, local_values, whole

run_ranks = pytest.importorskip("zero_core.testing").run_ranks  # spawns processes


def save_rank(rank, root, layouts):
    for layout in layouts:
        state = {"model": LAYOUTS[layout](whole()), "step": 3, "rank": ckpt.PerRank(rank)}
        ckpt.save(root / layout, state, step=3, policy=ckpt.SavePolicy(chunk_bytes=1000))


def load_rank(rank, root, saved, layouts):
    for world, sources in saved.items():
        for source, layout in itertools.product(sources, layouts):
            state = {"model": LAYOUTS[layout](whole(seed=1)), "step": 0, "rank": ckpt.PerRank()}
            before = dict(state["model"])
            loaded = ckpt.load(root / str(world) / source, into=state)
            expected = LAYOUTS[layout](whole())
            for name, leaf in state["model"].items():
                assert leaf is before[name]
                assert torch.equal(local_values(leaf), local_values(expected[name])), (source, layout, name)
            assert loaded.step == state["step"] == 3
            assert loaded.world == world
            assert state["rank"].value == rank % world


def layouts_for(world):
    return [name for name in LAYOUTS if name != "rows_and_columns" or world % 2 == 0]


def test_any_layout_loads_into_any_other(tmp_path):
    saved = {
        1: ["replicated"],
        2: layouts_for(2),
        3: ["flat_shards", "columns", "stages"],
        4: ["rows_and_columns"],
    }
    for world, layouts in saved.items():
        run_ranks(save_rank, world, tmp_path / str(world), layouts)
    for world in (1, 2, 3, 4):
        run_ranks(load_rank, world, tmp_path, saved, layouts_for(world), timeout_s=240)


def written_rank(rank, root):
    ckpt.save(root, {"model": LAYOUTS["replicated"](whole())}, step=0)


def test_replicas_are_written_once(tmp_path):
    run_ranks(written_rank, 4, tmp_path)
    step = tmp_path / "step-000000000"
    data = [os.path.getsize(step / name) for name in os.listdir(step) if name.startswith("data")]
    held = sum(t.numel() * t.element_size() for t in whole().values())
    assert len(data) == 4
    assert held <= sum(data) <= held + 7 * 64 + 4 * 8 + 4 * 64
    assert max(data) <= 0.5 * held


def big_shards(rank, world, seed):
    """A flat buffer of 24 MB in 40 tensors."""
    numel = 150_000
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer{i}": torch.randn(300, numel // 300, generator=generator) for i in range(40)}
    total, state, at = 40 * numel, {}, 0
    low, high = total * rank // world, total * (rank + 1) // world
    for name, tensor in tensors.items():
        start, stop = max(low - at, 0), min(high - at, numel)
        if start < stop:
            state[name] = ckpt.Shard(
                (300, numel // 300), torch.float32, (start,), tensor.reshape(-1)[start:stop]
            )
        at += numel
    return state


def save_big_rank(rank, root, world):
    ckpt.save(root, big_shards(rank, world, 0), step=0)


def load_big_rank(rank, root, world):
    state = big_shards(rank, world, 1)
    loaded = ckpt.load(root, into=state)
    expected = big_shards(rank, world, 0)
    assert all(torch.equal(state[name].local, expected[name].local) for name in expected)
    return loaded.read_bytes / loaded.wanted_bytes


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_rank_reads_what_it_needs_and_little_more(tmp_path, world):
    run_ranks(save_big_rank, 3, tmp_path, 3)
    for ratio in run_ranks(load_big_rank, world, tmp_path, world):
        assert 1 <= ratio <= 1.05


def casts_rank(rank, root):
    ckpt.save(root, {"w": LAYOUTS["flat_shards"](whole())}, step=0)
    state = {"w": LAYOUTS["rows"](whole(seed=1, dtype=torch.bfloat16))}
    ckpt.load(root, into=state)
    expected = LAYOUTS["rows"](whole(dtype=torch.bfloat16))
    assert all(torch.equal(local_values(state["w"][n]), local_values(expected[n])) for n in expected)


def test_floating_point_is_cast(tmp_path):
    run_ranks(casts_rank, 2, tmp_path)
