"""The norm of a mean that nobody has, from the norms of what it is the mean of."""

from __future__ import annotations

import math

import pytest
import torch
from comm_compress.optimizers.common import CommonPart
from hypothesis import given
from hypothesis import strategies as st


def gradients(num_ranks: int, noise: float, seed: int) -> torch.Tensor:
    """[ranks, elements]: one that all share, and noise of their own."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4096, generator=generator)
    return shared + noise * torch.randn(num_ranks, 4096, generator=generator)


def squares(grads: torch.Tensor) -> tuple[float, float]:
    """Of the mean, and the mean over ranks."""
    return float(grads.mean(0).square().sum()), float(grads.square().sum(1).mean())


@given(st.integers(1, 16), st.floats(0.0, 8.0), st.integers(0, 99))
def test_estimates_the_norm_of_the_mean(num_ranks: int, noise: float, seed: int) -> None:
    common = CommonPart()
    for step in range(10):
        common.observe(*squares(gradients(num_ranks, noise, 1000 * seed + step)), num_ranks)
    square, mean_square = squares(0.1 * gradients(num_ranks, noise, 1000 * seed + 10))
    assert common.norm(mean_square, num_ranks) == pytest.approx(math.sqrt(square), rel=0.15)


@given(st.integers(2, 16), st.integers(2, 16), st.floats(0.1, 4.0))
def test_goes_on_with_another_number_of_ranks(before: int, after: int, noise: float) -> None:
    first, second = CommonPart(), CommonPart()
    for step in range(10):
        first.observe(*squares(gradients(before, noise, step)), before)
    second.load(first.state())
    square, mean_square = squares(gradients(after, noise, 10))
    assert second.norm(mean_square, after) == pytest.approx(math.sqrt(square), rel=0.15)


def test_without_exact_steps_it_is_a_bound() -> None:
    square, mean_square = squares(gradients(4, 1.0, 0))
    assert CommonPart().norm(mean_square, 4) == pytest.approx(math.sqrt(mean_square))
    assert math.sqrt(square) < math.sqrt(mean_square)


def test_nothing_is_nothing() -> None:
    common = CommonPart()
    common.observe(0.0, 0.0, 4)
    assert common.norm(0.0, 4) == 0.0
