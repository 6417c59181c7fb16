"""Layouts: every element has one place and one owner, whatever the shapes and the number of ranks."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from zero_core.layout import ALIGN_ELEMENTS, plan_layout

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=8)


@given(shapes=SHAPES, world_size=st.integers(1, 7))
def test_slots_and_gaps_tile_the_buffer(shapes: list[tuple[int, ...]], world_size: int) -> None:
    layout = plan_layout([(str(i),) for i in range(len(shapes))], shapes, world_size)
    pieces = sorted([(s.offset, s.stop) for s in layout.slots if s.numel] + list(layout.gaps))
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces)][: len(pieces)]
    assert sum(stop - start for start, stop in pieces) == layout.numel
    assert [slot.numel for slot in layout.slots] == [math.prod(shape) for shape in shapes]
    assert all(slot.offset % ALIGN_ELEMENTS == 0 for slot in layout.slots)


@given(shapes=SHAPES, world_size=st.integers(1, 7))
def test_ranks_share_every_element_once(shapes: list[tuple[int, ...]], world_size: int) -> None:
    layout = plan_layout([(str(i),) for i in range(len(shapes))], shapes, world_size)
    owned: dict[tuple[int, int], int] = {}
    for rank in range(world_size):
        start, stop = layout.shard_range(rank)
        assert stop - start == layout.shard_numel
        assert layout.shard_numel % ALIGN_ELEMENTS == 0
        for part in layout.local_slots(start, stop):
            assert part.numel == part.stop - part.start > 0
            assert start + part.start == part.slot.offset + part.param_start
            for element in range(part.param_start, part.param_start + part.numel):
                assert owned.setdefault((part.index, element), rank) == rank
    assert len(owned) == sum(slot.numel for slot in layout.slots)


@given(shapes=SHAPES, world_size=st.integers(1, 7))
def test_padding_is_bounded(shapes: list[tuple[int, ...]], world_size: int) -> None:
    layout = plan_layout([(str(i),) for i in range(len(shapes))], shapes, world_size)
    payload = sum(slot.numel for slot in layout.slots)
    assert layout.numel - payload < ALIGN_ELEMENTS * (len(shapes) + world_size)
