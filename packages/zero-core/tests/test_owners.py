"""Owners of whole parameters: one each, the same on every rank, in balance; their parts travel once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zero_core.layout import plan_layout
from zero_core.owners import Routes, assign_owners

SIZES = st.lists(st.integers(0, 1000), max_size=30)
SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=8)


@given(sizes=SIZES, world_size=st.integers(1, 9))
def test_loads_differ_by_at_most_one_parameter(sizes: list[int], world_size: int) -> None:
    owners = assign_owners(sizes, [0] * world_size)
    loads = [0] * world_size
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    largest = max(sizes, default=0)
    assert max(loads) - min(loads) <= largest
    assert max(loads) <= sum(sizes) / world_size + largest
    assert owners == assign_owners(list(sizes), [0] * world_size)


@pytest.mark.parametrize(
    ("sizes", "world_size", "owners"),
    [
        ([], 2, []),
        ([5], 3, [0]),
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([1, 8, 3, 4], 2, [1, 0, 1, 1]),
        ([0, 0], 2, [0, 0]),
    ],
)
def test_largest_first_to_the_rank_with_least(sizes: list[int], world_size: int, owners: list[int]) -> None:
    assert assign_owners(sizes, [0] * world_size) == owners


@given(shapes=SHAPES, world_size=st.integers(1, 5), data=st.data())
def test_every_element_that_moves_travels_to_its_owner_once(
    shapes: list[tuple[int, ...]], world_size: int, data: st.DataObject
) -> None:
    layout = plan_layout([(str(i),) for i in range(len(shapes))], shapes, world_size)
    claimed = data.draw(st.sets(st.sampled_from(range(len(shapes))))) if shapes else set()
    moving = data.draw(st.sets(st.sampled_from(sorted(claimed)))) if claimed else set()
    owners = {index: data.draw(st.integers(0, world_size - 1)) for index in claimed}
    routes = Routes(layout, owners)
    arrived: dict[int, list[tuple[int, int]]] = {index: [] for index in moving}
    for holder in range(world_size):
        lo, hi = layout.shard_range(holder)
        for owner in range(world_size):
            for part in routes.parts(holder, owner, moving):
                assert owners[part.index] == owner
                assert 0 <= part.start < part.stop <= hi - lo
                arrived[part.index].append((part.param_start, part.param_start + part.numel))
    for index, ranges in arrived.items():
        edges = [0, *(edge for piece in ranges for edge in piece), math.prod(shapes[index])]
        assert edges[::2] == edges[1::2], "the pieces do not follow each other from end to end"
