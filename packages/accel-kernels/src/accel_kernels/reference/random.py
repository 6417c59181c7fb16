"""Random bits that depend on a seed and a place alone: SplitMix64 (OOPSLA 2014, figure 14) used as a counter."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def rounding_key(seed: int) -> int:
    """The 64-bit key of a seed: SplitMix64's mixing, so that neighbouring seeds share nothing."""
    z = (seed + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, by: int) -> Tensor:  # logical, on the two's complement that torch offers
    return (z >> by) & ((1 << (64 - by)) - 1)


def random_64(key: int, counters: Tensor) -> Tensor:
    """64 random bits a counter, as int64."""
    z = (counters + 1) * _signed(_GOLDEN) + _signed(key)
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


def random_32(key: int, indices: Tensor) -> Tensor:
    """32 random bits an index, as int64: the upper half of a counter's."""
    return _shift(random_64(key, indices), 32)


def random_16(key: int, first: int, numel: int, device: torch.device) -> Tensor:
    """16 random bits for each index from ``first`` on, as int64: a counter's 64 serve four neighbours.

    Index i takes bits 16 (i % 4) to 16 (i % 4) + 15 of counter i // 4.
    """
    counters = torch.arange(first // 4, (first + numel + 3) // 4, device=device)
    shifts = torch.arange(0, 64, 16, device=device)
    lanes = (random_64(key, counters).unsqueeze(1) >> shifts) & 0xFFFF
    return lanes.view(-1)[first % 4 : first % 4 + numel]
