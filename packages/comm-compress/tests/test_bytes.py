"""Bytes on the wire: as `wire` says, as `traffic` says, and as they pass torch.distributed, to the byte."""

from __future__ import annotations

from collections import Counter

import accel_kernels as ak
import comm_compress as cc
import pytest
import torch
import torch.distributed as dist
import zero_core as zero
from comm_compress import wire
from comm_compress.topology import Grid
from comm_compress.wire import BlockFormat, PlainFormat, Sent
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zero_core.testing import run_ranks

BLOCKS, WIDTH = 8, 256


@given(
    n=st.integers(0, 5000), bits=st.sampled_from([4, 8]), half=st.integers(1, 200), symmetric=st.booleans()
)
def test_messages_are_as_long_as_the_kernels_say(n: int, bits: int, half: int, symmetric: bool) -> None:
    form = BlockFormat(bits, 2 * half, symmetric)
    assert form.message_bytes(n) == ak.block_bytes(n, bits=bits, block_size=2 * half, symmetric=symmetric)


@given(ranks=st.integers(1, 64), numel=st.integers(0, 10_000), data=st.data())
def test_hops_send_what_one_level_sends(ranks: int, numel: int, data) -> None:
    """Within the node as much as elsewhere; across, 1 / node_size of what every rank to every rank would send."""
    size = data.draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    grid, form = Grid(ranks, size), BlockFormat(4)
    message = form.message_bytes(numel)
    two = wire.reduce(grid, numel, form)
    assert two.inside == (size - 1) * grid.num_nodes * message
    assert two.across * size == wire.to_each(grid, message).across
    assert wire.gather(grid, numel, form).total == (ranks - 1) * message
    again = wire.gather_again(grid, numel, PlainFormat(2))
    assert again == Sent(inside=(size - 1) * grid.num_nodes * numel * 2)


class Wiretap:
    """Bytes that this rank sends, where they leave zero-core; small ones are settings, meetings and norms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, node_size: int) -> None:
        self.sent: Counter[str] = Counter()
        send, own = dist.isend, dist.get_rank()

        def tapped(tensor, dst, *args, **kwargs):
            nbytes = tensor.numel() * tensor.element_size()
            where = (
                "small" if nbytes <= 1024 else "inside" if dst // node_size == own // node_size else "across"
            )
            self.sent[where] += nbytes
            return send(tensor, dst, *args, **kwargs)

        monkeypatch.setattr(dist, "isend", tapped)

    def take(self) -> Sent:
        found = Sent(self.sent["inside"], self.sent["across"])
        self.sent.clear()
        return found


def each_collective(rank: int, world: int, node_size: int, weights: str | None, grads: str) -> None:
    grid = Grid(world, node_size)
    form = PlainFormat(4) if weights is None else BlockFormat({"int8": 8, "int4": 4}[weights], 64)
    of_grads = BlockFormat({"int8": 8, "int4": 4}[grads], 64)
    made = cc.QuantizedCollectives(
        weights=weights,
        grads=grads,
        node_size=node_size,
        secondary=True,
        block_size=64,
        shared_memory=False,
        group=dist.group.WORLD,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        tap = Wiretap(monkeypatch, node_size)
        for numel in (4097, 5000):
            shard, out = torch.randn(numel), torch.empty(numel * world)
            made.gather_weights(lambda s=shard: s, out, tag=1, version=0).wait()
            assert tap.take() == wire.gather(grid, numel, form)
            made.gather_weights(lambda s=shard: s, out, tag=1, version=0).wait()
            if grid.num_nodes > 1:
                assert tap.take() == wire.gather_again(grid, numel, form)
            else:
                assert tap.take() == wire.gather(grid, numel, form)
            made.reduce_scatter(torch.randn(numel * world), shard, tag=1).wait()
            assert tap.take() == wire.reduce(grid, numel, of_grads)
            made.all_gather(shard, out, tag=1).wait()
            assert tap.take() == wire.gather(grid, numel, PlainFormat(4))
    traffic = cc.traffic(made)
    sizes = (4097, 5000)
    assert traffic.line("reduce").sent == sum((wire.reduce(grid, n, of_grads) for n in sizes), Sent())
    plain = sum((wire.gather(grid, n, PlainFormat(4)) for n in sizes), Sent())
    assert traffic.line("reduce").plain == traffic.line("exact_gather").sent == plain
    assert traffic.line("exact_gather").ratio == 1.0
    times = 1 if grid.num_nodes > 1 else 2
    first = traffic.line("gather")
    assert (first.calls, first.sent.total) == (
        2 * times,
        times * sum(wire.gather(grid, n, form).total for n in sizes),
    )
    if grid.num_nodes > 1:
        again = traffic.line("gather_again")
        assert again.sent == sum((wire.gather_again(grid, n, form) for n in sizes), Sent())
        assert again.plain == plain
    assert traffic.total.sent.total == sum(line.sent.total for line in traffic.lines)
    assert traffic.line("reduce").codec_s > 0
    saved = (
        plain.across - traffic.line("reduce").sent.across or plain.total - traffic.line("reduce").sent.total
    )
    assert traffic.line("reduce").break_even_bytes_per_s == pytest.approx(
        saved / traffic.line("reduce").codec_s
    )


@pytest.mark.parametrize(("world", "node_size"), [(2, 1), (3, 3), (4, 2)])
def test_bytes_of_each_collective(world: int, node_size: int) -> None:
    for weights, grads in (("int8", "int4"), (None, "int8")):
        run_ranks(each_collective, world, world, node_size, weights, grads)


# -- the paper's table ----------------------------------------------------------------------------------------

PARTS = {
    "stage 3": None,
    "qwZ": {"weights": "int8", "grads": None},
    "hpZ": {"weights": None, "grads": None, "secondary": True},
    "qgZ": {"weights": None, "grads": "int4"},
    "all": {"weights": "int8", "grads": "int4", "secondary": True},
}


def one_step(rank: int, options: dict | None) -> tuple[int, int]:
    """Bytes across nodes that this rank sends in a step, and those of the model in bf16, padding included."""
    made = lambda group: zero.PlainCollectives(group, shared_memory=False)  # noqa: E731
    if options is not None:
        made = cc.QuantizedCollectives(**options, node_size=2, shared_memory=False, min_bytes=0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)))
    precision = zero.Precision(compute=torch.bfloat16)
    units = lambda name, module: isinstance(module, nn.Linear)  # noqa: E731
    model = zero.shard(model, dist.group.WORLD, stage=3, collectives=made, precision=precision, units=units)
    opt = zero.ShardedOptimizer(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    nbytes = sum(unit.full_bytes for unit in zero.sharded(model).units)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tap = Wiretap(monkeypatch, 2)
        for _ in range(3):
            tap.take()
            model(torch.randn(2, WIDTH)).sum().backward()
            opt.step()
            opt.zero_grad()
        return tap.take().across, nbytes


def test_volume_between_two_nodes_of_two() -> None:
    """The paper's table 1, in compute-dtype bytes of the model, P, that leave a node; scales come on top.

    A plain collective sends each of the node's two ranks' P/2 to two ranks: P. The unit at the turn from forward to
    backward stays whole, so that plain stage 3 gathers it once: 1 / BLOCKS of P less.
    """
    of_part = {}
    for name, options in PARTS.items():
        (first, nbytes), (second, _), *_ = run_ranks(one_step, 4, options)
        of_part[name] = (first + second) / nbytes
    turn, scale8, scale4 = 1 / BLOCKS, 4 / 256, 4 / 256
    forward, backward, gradients = 1.0, 1.0 - turn, 1.0
    int8, int4 = (1 + scale8) / 2, (0.5 + scale4) / 2
    assert of_part["stage 3"] == forward + backward + gradients
    assert of_part["qwZ"] == (forward + backward) * int8 + gradients
    assert of_part["hpZ"] == forward + gradients
    # int4, and 1 / node_size of it, since the node's ranks add up first.
    assert of_part["qgZ"] == forward + backward + gradients * int4 / 2
    assert of_part["all"] == forward * int8 + gradients * int4 / 2
    assert 3.0 / of_part["all"] > 4.6
