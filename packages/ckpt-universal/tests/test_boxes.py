"""Parts of tensors: every element once, in order, whatever the shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ckpt_universal.boxes import (
    Box,
    covers_once,
    cut,
    disjoint_cover,
    flat_boxes,
    flat_range,
    intersect,
    whole_box,
)
from hypothesis import given
from hypothesis import strategies as st

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def indices(shape, box):
    """Positions in the flattened tensor, in row-major order of the box."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].reshape(-1).tolist()


@st.composite
def shape_and_boxes(draw, count=6):
    shape = draw(shapes)
    boxes = []
    for _ in range(draw(st.integers(0, count))):
        start = tuple(draw(st.integers(0, size - 1)) for size in shape)
        sizes = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True))
        boxes.append(Box(start, sizes))
    return shape, boxes


@given(shapes, st.data())
def test_a_flat_range_is_a_few_boxes_in_order(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = flat_boxes(shape, start, stop)
    assert [i for box in boxes for i in indices(shape, box)] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.within(shape) and flat_range(shape, box) is not None for box in boxes)


@given(shape_and_boxes(1))
def test_flat_range_knows_what_is_contiguous(case):
    shape, boxes = case
    for box in boxes:
        found = indices(shape, box)
        contiguous = found == list(range(found[0], found[0] + len(found)))
        assert flat_range(shape, box) == ((found[0], found[-1] + 1) if contiguous else None)


@given(shape_and_boxes(2))
def test_intersection(case):
    shape, boxes = case
    if len(boxes) == 2:
        shared = intersect(*boxes)
        expected = set(indices(shape, boxes[0])) & set(indices(shape, boxes[1]))
        assert set([] if shared is None else indices(shape, shared)) == expected


@given(shape_and_boxes(1), st.integers(0, 30))
def test_cutting_keeps_order_and_bound(case, most):
    shape, boxes = case
    for box in boxes:
        parts = list(cut(box, most))
        assert [i for part in parts for i in indices(shape, part)] == indices(shape, box)
        assert all(1 <= part.numel <= max(1, most) for part in parts)
        assert all(flat_range(box.sizes, relative(part, box)) is not None for part in parts)


def relative(part, box):
    return Box(tuple(a - b for a, b in zip(part.start, box.start, strict=True)), part.sizes)


@given(shape_and_boxes())
def test_a_cover_has_every_element_once_and_names_all_holders(case):
    shape, boxes = case
    boxes = [*boxes, whole_box(shape)]
    parts = disjoint_cover(shape, boxes)
    assert sorted(i for part, _ in parts for i in indices(shape, part)) == list(range(math.prod(shape)))
    for part, holders in parts:
        inside = [at for at, box in enumerate(boxes) if set(indices(shape, part)) <= set(indices(shape, box))]
        assert holders == inside


@given(shapes, st.integers(1, 5), st.data())
def test_flat_shards_of_any_number_of_ranks_cover(shape, ranks, data):
    numel = math.prod(shape)
    edges = sorted(data.draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1)))
    held = [
        box for lo, hi in zip([0, *edges], [*edges, numel], strict=True) for box in flat_boxes(shape, lo, hi)
    ]
    parts = disjoint_cover(shape, held)
    assert sum(part.numel for part, _ in parts) == numel
    assert all(len(holders) == 1 for _, holders in parts)


def test_what_nobody_holds_is_an_error():
    with pytest.raises(ValueError, match="2 of 6 elements are held by nobody"):
        disjoint_cover((2, 3), [Box((0, 0), (2, 2))])
    assert disjoint_cover((0, 3), []) == []
    assert disjoint_cover((), [Box((), ())]) == [(Box((), ()), [0])]


@given(st.data())
def test_a_cover_is_told_from_what_overlaps(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    count = np.zeros(shape, int)
    boxes = []
    for box in cut_up(whole_box(shape), data):
        at = data.draw(st.integers(0, 9))
        moved = box if at else Box(tuple(0 for _ in box.start), box.sizes)
        boxes.append(moved)
        count[tuple(slice(a, b) for a, b in zip(moved.start, moved.stop, strict=True))] += 1
    assert covers_once(shape, boxes) == bool((count == 1).all())


def cut_up(box, data):
    """Boxes that cover one, by cuts of any direction within each other."""
    dim = data.draw(st.integers(0, len(box.sizes) - 1))
    if box.sizes[dim] == 1 or data.draw(st.integers(0, 3)) == 0:
        return [box]
    low = data.draw(st.integers(1, box.sizes[dim] - 1))
    sizes, rest, start = list(box.sizes), list(box.sizes), list(box.start)
    sizes[dim], rest[dim], start[dim] = low, rest[dim] - low, start[dim] + low
    return cut_up(Box(box.start, tuple(sizes)), data) + cut_up(Box(tuple(start), tuple(rest)), data)


def test_covers_of_scalars_and_of_nothing():
    assert covers_once((), [Box((), ())])
    assert not covers_once((), [Box((), ()), Box((), ())])
    assert covers_once((0, 3), [])
    assert not covers_once((2,), [])
