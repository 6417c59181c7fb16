"""Who writes what, and what is read: sums over simulated files."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ckpt_universal.boxes import Box, flat_boxes, whole_box
from ckpt_universal.plan import Held, plan_chunks, plan_extents, plan_spans
from hypothesis import given
from hypothesis import strategies as st


def test_replicas_are_written_once_and_shared_out():
    tensors = {f"w{i}": Held((64, 10 + i), "float32", 4, (whole_box((64, 10 + i)),)) for i in range(20)}
    plan = plan_chunks([tensors] * 4, 1 << 20)
    names = [chunk.name for chunks in plan for chunk in chunks]
    assert sorted(names) == sorted(tensors)
    loads = [sum(chunk.nbytes for chunk in chunks) for chunks in plan]
    assert max(loads) - min(loads) <= max(64 * 30 * 4, 1)
    assert max(loads) <= 1.1 * sum(loads) / 4


def test_own_parts_stay_and_replicas_go_where_least_is():
    own = Held((100,), "float32", 4, (Box((0,), (100,)),))
    both = Held((50,), "float32", 4, (Box((0,), (50,)),))
    plan = plan_chunks([{"own": own, "both": both}, {"both": both}], 1 << 20)
    assert [[chunk.name for chunk in chunks] for chunks in plan] == [["own"], ["both"]]


def test_chunks_are_bounded():
    held = Held((10, 1000), "float64", 8, (Box((0, 0), (10, 1000)),))
    (chunks,) = plan_chunks([{"w": held}], 3000)
    assert all(chunk.nbytes <= 3000 for chunk in chunks)
    assert sum(chunk.box.numel for chunk in chunks) == 10_000


def test_disagreement_and_holes_name_the_tensor():
    one, other = (Held(shape, "float32", 4, (whole_box(shape),)) for shape in ((2,), (3,)))
    with pytest.raises(
        ValueError, match=r"'w': ranks disagree about it: rank 0: \(2,\) float32, rank 1: \(3,\)"
    ):
        plan_chunks([{"w": one}, {"w": other}], 8)
    with pytest.raises(ValueError, match=r"'w', shape \(4,\): 1 of 4 elements are held by nobody"):
        plan_chunks([{"w": Held((4,), "float32", 4, (Box((0,), (3,)),))}], 8)


@st.composite
def a_load(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    numel = math.prod(shape)
    edge = draw(st.integers(0, numel))
    held = [flat_boxes(shape, 0, edge), flat_boxes(shape, edge, numel)]
    start = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, start, strict=True))
    return shape, held, Box(start, sizes), draw(st.integers(1, 40)), draw(st.integers(1, 64))


@given(a_load())
def test_spans_and_extents_bring_every_element(case):
    shape, held, wanted, chunk_bytes, most = case
    values = np.arange(math.prod(shape), dtype="<i4").reshape(shape)
    holdings = [{"w": Held(shape, "int32", 4, tuple(boxes))} for boxes in held]
    plan = plan_chunks(holdings, chunk_bytes)
    files, chunks = [], []
    for number, assigned in enumerate(plan):
        data = b""
        for chunk in assigned:
            ranges = tuple(slice(a, b) for a, b in zip(chunk.box.start, chunk.box.stop, strict=True))
            chunks.append((chunk.box, number, len(data)))
            data += values[ranges].tobytes()
        files.append(data)
    spans = list(plan_spans([box for box, _, _ in chunks], [wanted], 4, most))
    in_files = [
        (chunks[s.chunk][1], chunks[s.chunk][2] + s.start, chunks[s.chunk][2] + s.stop) for s in spans
    ]
    page = 16
    extents = plan_extents(in_files, page, most, [len(data) for data in files])
    found = np.full(shape, -1, dtype="<i4")
    seen = []
    for extent in extents:
        assert extent.start % page == 0
        read = files[extent.file][extent.start : extent.stop]
        for position in extent.members:
            span, (file, start, stop) = spans[position], in_files[position]
            assert file == extent.file
            assert extent.start <= start
            assert stop <= extent.stop
            seen.append(position)
            box = chunks[span.chunk][0]
            data = np.frombuffer(read[start - extent.start : stop - extent.start], "<i4")
            strides = [4 * math.prod(box.sizes[dim + 1 :]) for dim in range(len(shape))]
            part = np.lib.stride_tricks.as_strided(data, span.box.sizes, strides)
            found[tuple(slice(a, b) for a, b in zip(span.box.start, span.box.stop, strict=True))] = part
    assert sorted(seen) == list(range(len(spans)))
    inside = tuple(slice(a, b) for a, b in zip(wanted.start, wanted.stop, strict=True))
    assert np.array_equal(found[inside], values[inside])
    assert (found >= 0).sum() == wanted.numel
