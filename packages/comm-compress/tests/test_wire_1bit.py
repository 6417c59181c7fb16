"""Chunks and byte counts, as arithmetic."""

from __future__ import annotations

import pytest
from accel_kernels import sign_bytes
from comm_compress import CompressConfigError
from comm_compress.wire_1bit import chunk_ranges, run_volume, sent_1bit, sent_exact
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(0, 5000)
worlds = st.integers(1, 40)


@given(sizes, worlds)
def test_chunks_cover_everything_once_and_are_balanced(numel: int, world: int) -> None:
    chunks = chunk_ranges(numel, world)
    assert [i for start, stop in chunks for i in range(start, stop)] == list(range(numel))
    lengths = [stop - start for start, stop in chunks]
    assert len(lengths) == world
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("numel", "world"), [(-1, 2), (3, 0)])
def test_nonsense_is_refused(numel: int, world: int) -> None:
    with pytest.raises(CompressConfigError, match="expected numel >= 0"):
        chunk_ranges(numel, world)


@given(sizes, worlds)
def test_what_is_sent_is_what_is_received(numel: int, world: int) -> None:
    chunks = [sign_bytes(stop - start) for start, stop in chunk_ranges(numel, world)]
    sent = [sent_1bit(numel, world, rank) for rank in range(world)]
    assert sum(each.scatter for each in sent) == (world - 1) * sum(chunks)
    assert sum(each.gather for each in sent) == (world - 1) * sum(chunks)
    assert all(each.total == 0 for each in sent) or world > 1


@pytest.mark.parametrize(("itemsize", "times"), [(2, 16), (4, 32)])
@pytest.mark.parametrize("world", [2, 4, 8, 64])
def test_a_compressed_step_sends_16_or_32_times_less(itemsize: int, times: int, world: int) -> None:
    numel = 4 << 20  # the default bucket
    ratio = sent_exact(numel, world, itemsize).total / sent_1bit(numel, world, 0).total
    assert times >= ratio >= times / 1.01  # scales take at most 1 %


def test_a_run_with_15_percent_of_warm_up_sends_5_times_less() -> None:
    """1-bit Adam's BERT-Large run: 23 000 of 152 000 steps warm up."""
    run = run_volume(
        [4 << 20] * 80, 16, 2, num_steps=152_000, exact_steps=range(22_800), sync_steps=range(22_800, 152_000)
    )
    assert run.rounds == 152_000
    assert run.ratio == pytest.approx(1 / (0.15 + 0.85 / 16), rel=1e-3)
    assert run.ratio > 4.9
    shorter = run_volume(
        [4 << 20] * 80, 16, 4, num_steps=152_000, exact_steps=range(22_800), sync_steps=range(22_800, 152_000)
    )
    assert shorter.ratio > 5.6


def test_nothing_sent_is_infinitely_less() -> None:
    alone = run_volume([100], 1, 4, num_steps=3, exact_steps=[0], sync_steps=[1, 2])
    assert (alone.sent_bytes, alone.ratio) == (0, float("inf"))
