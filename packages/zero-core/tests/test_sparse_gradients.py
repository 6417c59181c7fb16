"""Embeddings with sparse gradients: plain averaging's values, and only touched rows on the wire."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zero_core as zero
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from zero_core.collectives import Wire
from zero_core.layout import plan_layout
from zero_core.rows import _add_rows
from zero_core.testing import run_ranks
from zero_core_models import dp_mesh, plain_copy, relative_error, seeded

ROWS, WIDTH = 101, 7


class Model(nn.Module):
    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.bag = nn.EmbeddingBag(ROWS, WIDTH, mode="mean", sparse=sparse)
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, 1))

    def forward(self, ids: torch.Tensor, *, bag: bool = True) -> torch.Tensor:
        x = self.embed(ids).sum(1) + self.embed(ids.flip(0)).mean(1)
        if bag:
            x = x + self.bag(ids)
        return self.body(x).square().mean()


def ids_of(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    high = ROWS if step % 2 else 5  # many ranks touch one row, and again and again
    return torch.randint(0, high, (3, 4), generator=generator)


def build(name: str, params) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.1)
    return torch.optim.Adagrad(params, lr=0.1)


def train(
    rank: int, shape: tuple[int, ...], stage: int, accumulate: int, optimizer: str, quiet: bool
) -> float:
    names = ("dp_replicate", "dp_shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    world_size = torch.Size(shape).numel()
    start = seeded(Model)
    plain = plain_copy(start)
    model = zero.shard(start, mesh, stage=stage)
    opt = zero.ShardedOptimizer(model, build(optimizer, model.parameters()))
    inner = build(optimizer, plain.parameters())
    for step in range(4):
        for micro in range(accumulate):
            at = step * accumulate + micro
            bag = [(r + at) % 3 > 0 for r in range(world_size)]
            if quiet and micro < accumulate - 1:
                with zero.no_sync(model):
                    (model(ids_of(rank, at), bag=bag[rank]) / accumulate).backward()
            else:
                (model(ids_of(rank, at), bag=bag[rank]) / accumulate).backward()
            for r in range(world_size):
                (plain(ids_of(r, at), bag=bag[r]) / accumulate / world_size).backward()
        norm = zero.clip_grad_norm(opt, 100.0)
        expected = sum(
            float((p.grad.coalesce().values() if p.grad.is_sparse else p.grad).square().sum())
            for p in plain.parameters()
        )
        assert float(norm) == pytest.approx(expected**0.5, rel=1e-5)
        opt.step()
        opt.zero_grad()
        inner.step()
        inner.zero_grad()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(2,), (3,)])
@pytest.mark.parametrize("quiet", [False, True])
def test_equals_plain_averaging(stage: int, shape: tuple[int, ...], quiet: bool) -> None:
    accumulate = 3 if quiet else 2
    errors = run_ranks(train, shape[0], shape, stage, accumulate, "sgd", quiet)
    errors += run_ranks(train, shape[0], shape, stage, 1, "adagrad", False)
    assert max(errors) <= 2e-6


@pytest.mark.parametrize("stage", [1, 3])
def test_with_replicas(stage: int) -> None:
    assert max(run_ranks(train, 4, (2, 2), stage, 2, "sgd", False)) <= 2e-6


def elements_on_the_wire(rank: int, sparse: bool) -> int:
    sent = 0
    swap, reduce = Wire.swap, Wire.reduce

    def counted_swap(self, name, out, into):
        nonlocal sent
        sent += sum(part.numel() for r, part in enumerate(out) if r != self.group.rank())
        return swap(self, name, out, into)

    def counted_reduce(self, name, full, out):
        nonlocal sent
        sent += full.numel() // 2
        return reduce(self, name, full, out)

    torch.manual_seed(0)
    model = zero.shard(nn.Sequential(nn.Embedding(10_000, 8, sparse=sparse)), dp_mesh(2), stage=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wire, "swap", counted_swap)
        patch.setattr(Wire, "reduce", counted_reduce)
        model(torch.randint(0, 10_000, (16,))).square().sum().backward()
    return sent


def test_only_touched_rows_travel() -> None:
    rows = 16
    for sent in run_ranks(elements_on_the_wire, 2, True):
        assert 0 < sent <= rows * (8 + 1) + 1
    assert run_ranks(elements_on_the_wire, 2, False) == [40_000] * 2


def no_dense_buffer(rank: int) -> int:
    model = zero.shard(nn.Sequential(nn.Embedding(4_000, 8, sparse=True)), dp_mesh(2), stage=3)
    with zero.no_sync(model):
        model(torch.arange(8)).sum().backward()
    lane = zero.sharded(model).reducer.lanes[0]
    assert lane.bucket.flat is None
    lane.bucket._grad = lane.bucket._grad.coalesce()
    return lane.bucket._grad.values().numel()


def test_a_local_gradient_is_as_large_as_its_rows() -> None:
    assert run_ranks(no_dense_buffer, 2) == [64] * 2


def tied(rank: int) -> float:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(ROWS, WIDTH, sparse=True)
            self.head = nn.Linear(WIDTH, ROWS, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(self.embed(ids)).flatten(0, 1), ids.flatten())

    start = seeded(Tied)
    plain = plain_copy(start)
    plain.head.weight = plain.embed.weight
    model = zero.shard(start, dp_mesh(2), stage=3)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(ids_of(rank, 1)).backward()
    opt.step()
    for r in range(2):
        (plain(ids_of(r, 1)) / 2).backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    return relative_error(zero.full_state_dict(model), plain.state_dict())


def test_a_tied_embedding_is_reduced_densely() -> None:
    assert max(run_ranks(tied, 2)) <= 2e-6


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_fall_into_the_shards_that_hold_them(data: st.DataObject) -> None:
    num_rows, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 50))
    world_size = data.draw(st.integers(1, 5))
    layout = plan_layout([("weight",)], [(num_rows, width)], world_size)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, num_rows - 1)))), dtype=torch.int64)
    values = torch.randn(len(rows), width)
    whole = torch.zeros(layout.numel)
    whole[: num_rows * width].view(num_rows, width)[rows] = values
    for rank in range(world_size):
        start, stop = layout.shard_range(rank)
        edges = start // width, -(-min(stop, num_rows * width) // width)
        chosen = (rows >= edges[0]) & (rows < edges[1])
        part = torch.zeros(stop - start)
        _add_rows(part, start, rows[chosen], values[chosen])
        assert torch.equal(part, whole[start:stop])
