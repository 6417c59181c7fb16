"""The way of accelerators: the same messages through the back end's own collectives, here gloo's."""

from __future__ import annotations

import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
from comm_compress import hops
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat
from compress_lab import simulated_gather, simulated_reduce
from zero_core.testing import run_ranks


def by_backend(rank: int, world: int, node_size: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(hops.Hop, "swap", lambda self, sent, tag, then, entry: (
            hops.swap_by_backend(self.group, sent, then)))  # fmt: skip
        monkeypatch.setattr(hops.Hop, "gather", lambda self, own, tag, then, entry: (
            hops.gather_by_backend(self.group, own, then)))  # fmt: skip
        made = cc.QuantizedCollectives(
            node_size=node_size, secondary=True, min_bytes=0, group=dist.group.WORLD
        )
        generator = torch.Generator().manual_seed(0)
        for numel in (1, 300):
            shards = [torch.randn(numel, generator=generator) for _ in range(world)]
            out = torch.empty(world * numel)
            made.gather_weights(lambda s=shards: s[rank], out, tag=numel, version=1).wait()
            assert torch.equal(out, simulated_gather(shards, BlockFormat(8)))
            again = torch.empty_like(out)
            made.gather_weights(lambda s=shards: s[rank], again, tag=numel, version=1).wait()
            assert torch.equal(again, out)
            fulls = [torch.randn(world * numel, generator=generator) for _ in range(world)]
            reduced = torch.empty(numel)
            made.reduce_scatter(fulls[rank].clone(), reduced, tag=numel).wait()
            expected = simulated_reduce(fulls, Grid(world, node_size), BlockFormat(4))[rank]
            torch.testing.assert_close(reduced, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("world", "node_size"), [(2, 2), (4, 2)])
def test_the_same_messages(world: int, node_size: int) -> None:
    run_ranks(by_backend, world, world, node_size)
