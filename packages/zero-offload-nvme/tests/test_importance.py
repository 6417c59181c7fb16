"""Which channels are chosen does not depend on how a parameter is cut over ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from zero_offload_nvme.importance import (
    importance,
    most_important,
    num_channels,
    num_chosen,
    pick,
    rows_of,
)
from zero_offload_nvme.row_set import RowSet

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def cut_parameters(draw):
    """A gradient, and where its flattened form is cut."""
    shape = draw(SHAPES)
    numel = torch.Size(shape).numel()
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=3)))
    seed = draw(st.integers(0, 1000))
    grad = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()
    return grad, [0, *cuts, numel]


def parts_of(grad: torch.Tensor, cuts: list[int]):
    """Each rank's shard, with something else before its part, and the rows in it."""
    before = 3
    for start, stop in pairwise(cuts):
        if start < stop:
            shard = torch.cat([torch.full((before,), 1e6), grad.flatten()[start:stop]])
            yield shard, rows_of(grad.shape, before, start, stop - start)


@given(cut_parameters())
def test_importance_adds_up_over_ranks(case) -> None:
    grad, cuts = case
    channels = num_channels(grad.shape)
    total = sum(importance(shard, rows, channels) for shard, rows in parts_of(grad, cuts))
    assert torch.allclose(total, grad.flatten(1).square().sum(1), rtol=1e-5)


@given(cut_parameters(), st.floats(0.01, 1.0))
def test_every_element_of_a_chosen_channel_is_moved_once(case, ratio: float) -> None:
    grad, cuts = case
    channels = num_channels(grad.shape)
    chosen = torch.zeros(channels, dtype=torch.bool)
    chosen[most_important(grad.flatten(1).square().sum(1), num_chosen(channels, ratio))] = True
    found = []
    for shard, rows in parts_of(grad, cuts):
        assert sum(each.num * each.width for each in rows) == len(shard) - 3
        row_set = RowSet({7: pick(rows, chosen)}, torch.device("cpu"))
        compact = row_set.take(shard, torch.empty(row_set.numel))
        assert row_set.spans == {7: (0, row_set.numel)}
        row_set.put(-compact, shard)
        assert (shard[:3] == 1e6).all()
        found.append(shard[3:])
    expected = torch.where(chosen[:, None], -grad.flatten(1), grad.flatten(1))
    assert torch.equal(torch.cat(found), expected.flatten())


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_the_largest_are_chosen_and_of_equals_the_first(values, data) -> None:
    count = data.draw(st.integers(0, len(values)))
    chosen = most_important(torch.tensor(values).float(), count).tolist()
    assert chosen == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
def test_ratio_rounds_up(channels: int, ratio: float) -> None:
    count = num_chosen(channels, ratio)
    assert count <= channels
    assert channels * ratio - 1e-6 <= count < channels * ratio + 1 or count == channels == 0


def test_what_is_not_chosen_among() -> None:
    assert [num_channels(shape) for shape in [(), (5,), (0, 3), (3, 0), (4, 2), (4, 2, 2)]] == [
        0,
        0,
        0,
        0,
        4,
        4,
    ]
    assert num_chosen(20, 0.05) == 1
    assert num_chosen(100, 0.07) == 7
