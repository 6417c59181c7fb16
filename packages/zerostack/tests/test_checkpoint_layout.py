"""Whatever ranks hold, every element is written once and every range is found again. Pure."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zerostack.checkpoint.layout import Range, overlapping, plan_pieces

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def holdings(draw):
    """For each rank, ranges that together cover some tensors; some tensors are replicated."""
    world = draw(st.integers(1, 4))
    held = [{} for _ in range(world)]
    for index, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=5))):
        numel = math.prod(shape)
        name = f"t{index}"
        if draw(st.booleans()):
            edges = [0] * world + [numel] * world
        else:
            cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=world - 1, max_size=world - 1)))
            edges = [0, *cuts], [*cuts, numel]
            edges = [*edges[0], *edges[1]]
        for rank in range(world):
            start, stop = edges[rank], edges[world + rank]
            if stop > start or numel == 0:
                held[rank][name] = Range(shape, torch.float32, start, stop)
    return held


@given(holdings(), st.integers(1, 40))
def test_pieces_cover_every_tensor_once_and_are_written_by_a_holder(held, piece_bytes):
    for name, plan in plan_pieces(held, piece_bytes).items():
        numel = math.prod(plan.shape)
        assert plan.pieces[0].start == 0
        assert plan.pieces[-1].stop == numel
        for before, after in zip(plan.pieces, plan.pieces[1:], strict=False):
            assert before.stop == after.start
        for piece in plan.pieces:
            owner = held[piece.rank][name]
            assert owner.start <= piece.start
            assert piece.stop <= owner.stop
            assert (piece.stop - piece.start) * 4 <= max(piece_bytes, 4)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_the_pieces_of_a_range_are_those_that_share_elements_with_it(lengths, data):
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    start = data.draw(st.integers(0, stops[-1]))
    stop = data.draw(st.integers(start, stops[-1]))
    expected = [i for i, end in enumerate(stops) if max(start, end - lengths[i]) < min(stop, end)]
    assert list(overlapping(stops, start, stop)) == expected


def test_replicas_are_spread_over_the_ranks():
    held = [{f"t{i}": Range((4,), torch.float32, 0, 4) for i in range(6)} for _ in range(3)]
    writers = [plan.pieces[0].rank for plan in plan_pieces(held).values()]
    assert sorted(writers) == [0, 0, 1, 1, 2, 2]


def test_what_nobody_holds_and_what_ranks_disagree_about_is_named():
    with pytest.raises(ValueError, match="'w': no rank holds element 2 of 4"):
        plan_pieces([{"w": Range((4,), torch.float32, 0, 2)}])
    with pytest.raises(
        ValueError, match=r"'w': ranks disagree about it: rank 0: \(4,\) torch.float32, rank 1: \(2, 2\)"
    ):
        plan_pieces([{"w": Range((4,), torch.float32, 0, 2)}, {"w": Range((2, 2), torch.float32, 2, 4)}])
